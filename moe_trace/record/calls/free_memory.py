"""Give the operating system back what reducing calls has freed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_MANY = 2**22  # as samples have them: 32 MB


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such way to ask for the functions of the process
        return None
    return found


def give_back_memory(counts: int) -> None:
    """Have the C library return free pages, where it can: glibc keeps those that lie below used ones.

    The small tensors of waiting calls lie between the large ones that models and reductions free, so that
    some 10 MB stay resident without being anybody's. It takes milliseconds: only where that many `counts` of
    experts were recorded that it matters.
    """
    trim = _trim()
    if trim is not None and counts > _MANY:
        trim(0)
