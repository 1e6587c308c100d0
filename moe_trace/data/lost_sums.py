"""Sums of what several traces of one run, or several tracers of one trace, lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any

from moe_trace.data.schema import Lost

_COUNTS = tuple(field.name for field in fields(Lost) if isinstance(field.default, int))


def add_lost(parts: Sequence[Lost], called: Collection[str]) -> Lost:
    """Return the sum. A router counts as never called only if none of the traces called it.

    Args:
        called: module paths of the routers that were called.
    """
    never = dict.fromkeys(name for lost in parts for name in lost.never_called if name not in called)
    counts: Any = {name: sum(getattr(lost, name) for lost in parts) for name in _COUNTS}
    return Lost(
        misread={name: why for lost in parts for name, why in lost.misread.items()},
        never_called=tuple(never),
        **summed(parts, "without_range", "unplaced", "untimed", "calls_seen", "not_reached"),
        calls=_by_router([lost.calls for lost in parts]),
        hook_failure=next((lost.hook_failure for lost in parts if lost.hook_failure), None),
        **counts,
    )


def summed(parts: Iterable[Lost], *names: str) -> dict[str, Any]:
    """Return the named fields, which count by key, summed over the parts."""
    parts = tuple(parts)
    return {name: dict(sum((Counter(getattr(lost, name)) for lost in parts), Counter())) for name in names}


def _by_router(parts: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = {}
    for lost in parts:
        for name, reasons in lost.items():
            total.setdefault(name, Counter()).update(reasons)
    return {name: dict(reasons) for name, reasons in total.items()}
