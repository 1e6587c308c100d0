"""Return memory freed after reductions to the operating system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_MANY = 2**22  # counts in samples, which take 32 MB


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # the process does not expose its C functions this way
        return None
    return found


def give_back_memory(counts: int) -> None:
    """Make the C library return free pages, if it can: glibc keeps free pages that lie below used ones.

    The small tensors of pending calls lie between the large ones that models and reductions free, so some 10
    MB of free memory would stay resident. The call takes milliseconds, so it runs only after so many `counts`
    of experts that it matters.
    """
    trim = _trim()
    if trim is not None and counts > _MANY:
        trim(0)
