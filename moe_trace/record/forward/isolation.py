"""Isolate moe_trace from user code: its errors do not reach the model, nor user modes its operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe_trace.find.private.torch_names import outside_functions, outside_modes


def warn_user(message: str, *, stacklevel: int = 3) -> None:
    """Warn, but stay silent where warnings are errors, which would end the user's forward."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
    except RuntimeWarning:
        return


@contextmanager
def apart() -> Iterator[None]:
    """Disable gradients, and hide operators from the user's modes.

    A selective checkpointing policy is such a mode: it numbers the operators of a forward, so an extra
    operator in the forward but not in its recomputation would make it return the output of another one.
    """
    with outside_functions(), torch.no_grad(), outside_modes():
        yield


class Failures:
    """Handler of errors in moe_trace's hooks: warns once, and keeps them out of the user's forward."""

    def __init__(self) -> None:
        self.first: str | None = None

    def note(self, error: Exception) -> None:
        """Store and warn of the first error."""
        if self.first is None:
            self.first = f"{type(error).__name__}: {error}"
            warn_user(f"a hook of moe_trace failed ({self.first}); the model runs on, its routing is lost")

    def guarded(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function, and note its exception instead of raising it."""
        try:
            function(*arguments)
        except Exception as error:
            self.note(error)
