"""Different ways in which other tools write the same event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]


def with_correlation(event: Event, spell: Callable[[int], Any]) -> Event:
    args = event.get("args", {})
    if "correlation" not in args:
        return event
    return {**event, "args": {**args, "correlation": spell(args["correlation"])}}


def as_device(event: Event, device: str) -> Event:
    for part in ("runtime", "driver"):
        if event.get("cat") == f"cuda_{part}":
            return {**event, "cat": f"{device}_{part}"}
    return event


SPELLINGS: dict[str, Callable[[Event], Event]] = {
    "floats": lambda e: with_correlation(e, float),
    "texts": lambda e: with_correlation(e, str),
    "texts of floats": lambda e: with_correlation(e, lambda n: f"{n}.0"),
    "hex": lambda e: with_correlation(e, hex),
    "names": lambda e: with_correlation(e, lambda n: f"launch-{n}"),
    "beyond 64 bits signed": lambda e: with_correlation(e, lambda n: 2**63 + n),
    "hex flows": lambda e: {**e, "id": hex(e["id"])} if isinstance(e.get("id"), int) else e,
    "float flows": lambda e: {**e, "id": float(e["id"])} if isinstance(e.get("id"), int) else e,
    "float threads": lambda e: {**e, "tid": float(e["tid"])} if isinstance(e.get("tid"), int) else e,
    "times as texts": lambda e: {**e, **{k: str(e[k]) for k in ("ts", "dur") if k in e}},
    "odd arguments": lambda e: {**e, "name": e["name"], "args": {**e.get("args", {}), "dtype": {"a": [1]}}},
    **{device: lambda e, device=device: as_device(e, device) for device in ("hip", "musa")},
}
