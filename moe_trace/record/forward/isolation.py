"""Keep our own work apart from the user's: no error of ours enters theirs, no mode of theirs ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe_trace.find.private.torch_names import outside_functions, outside_modes


def warn_user(message: str, *, stacklevel: int = 3) -> None:
    """Warn; where the user turned warnings into errors, stay silent instead of ending their forward."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
    except RuntimeWarning:
        return


@contextmanager
def apart() -> Iterator[None]:
    """Without gradients, and seen by no mode of the user's.

    A policy of selective checkpointing is such a mode: it numbers the operators of a forward, and an
    operator more in the forward than in its recomputation would make it return another's output.
    """
    with outside_functions(), torch.no_grad(), outside_modes():
        yield


class Failures:
    """Keeps what goes wrong in hooks of ours from the user's forward: said once, counted as lost."""

    def __init__(self) -> None:
        self.first: str | None = None

    def note(self, error: Exception) -> None:
        """Something went wrong."""
        if self.first is None:
            self.first = f"{type(error).__name__}: {error}"
            warn_user(f"a hook of moe_trace failed ({self.first}); the model runs on, its routing is lost")

    def guarded(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function."""
        try:
            function(*arguments)
        except Exception as error:
            self.note(error)
