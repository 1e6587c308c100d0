"""Tests that searching a file block by block finds each match once, wherever the blocks end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graph_trace import copy_of_mark, event, replay
from moe_trace.data.schema import range_name
from moe_trace.data.trace_json import windows
from moe_trace.data.trace_json.windows import EventBytes
from moe_trace.timeline.correlate.launches import read_launches
from moe_trace.timeline.correlate.scan import RangeEvent, RangeSearch

SMALL_EVENT = 300
"""Bytes, in place of `EVENT_MAX`; each event below is shorter."""

RANGES = [
    event(category, range_name(kind, f"L0{layer}"), 100.0 * i + 10 * layer, 5.0, **{"External id": i})
    for i, kind in enumerate(("block", "router", "experts"))
    for layer in range(2)
    for category in ("user_annotation", "gpu_user_annotation", "cpu_op")
]
OTHERS = [*replay(1000, 1), *copy_of_mark(1200, 2), *replay(2000, 3, compiled=True)]
STYLES: dict[str, Callable[[Any], str]] = {
    "as Kineto writes": lambda events: ",\n  ".join(json.dumps(one) for one in events),
    "minified": lambda events: ",".join(json.dumps(one, separators=(",", ":")) for one in events),
    "name first": lambda events: ", ".join(json.dumps({"name": one["name"], **one}) for one in events),
}


def found_by_chunk(
    path: Path, read: Callable[[EventBytes], Any], monkeypatch: pytest.MonkeyPatch
) -> dict[int, Any]:
    """What is found in the file with blocks of every size."""
    size = path.stat().st_size
    monkeypatch.setattr(windows, "EVENT_MAX", SMALL_EVENT)
    found = {}
    with path.open("rb") as file:
        for chunk in range(1, size + 2):
            monkeypatch.setattr(windows, "CHUNK", chunk)
            found[chunk] = read(EventBytes(file, 0, size))
    return found


@pytest.mark.parametrize("write", STYLES.values(), ids=STYLES)
def test_blocks_of_any_size_find_every_range_once(
    tmp_path: Path, write: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.json"
    path.write_text(write(RANGES))
    expected = [
        (one["name"], one["ts"], one["cat"] == "gpu_user_annotation")
        for one in RANGES
        if one["cat"] != "cpu_op"
    ]

    def named(event: RangeEvent) -> tuple[str, float, bool]:
        return range_name(event.kind, event.site), event.span.start_us, event.on_device

    def ranges(events: EventBytes) -> list[tuple[str, float, bool]]:
        search = RangeSearch()
        for window in events.windows():
            search(window)
        return list(map(named, search.found(events)))

    found = found_by_chunk(path, ranges, monkeypatch)
    assert {chunk: names for chunk, names in found.items() if names != expected} == {}


def test_blocks_of_any_size_find_every_launch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.json"
    path.write_text(STYLES["as Kineto writes"](OTHERS))
    found = found_by_chunk(path, read_launches, monkeypatch)
    whole = found[max(found)]
    assert [len(one.work) for one in whole.graphs] == [6, 6] and len(whole.copies) == 1
    assert [chunk for chunk, table in found.items() if table != whole] == []
