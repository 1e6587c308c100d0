"""Separate what merging added to a trace from the bytes that the profiler wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def recording_in(trace: dict[str, Any]) -> dict[str, Any]:
    """The recording that a trace carries in one of its events, or under a key as older releases wrote it."""
    found = [
        event["args"]["moe_trace"]
        for event in trace["traceEvents"]
        if event.get("ph") == "M" and "moe_trace" in event["args"]
    ]
    found += [trace["moe_trace"]] if "moe_trace" in trace else []
    found = [one for one in found if isinstance(one, dict) and "schema_version" in one]  # the user's are none
    assert len(found) == 1, f"{len(found)} recordings"
    return found[0]


def without_additions(path: Path) -> bytes:
    """The original bytes, by the numbers that the file itself tells."""
    data = path.read_bytes()
    trace = json.loads(data)
    splice = recording_in(trace)["splice"]
    if "events_offset" in splice:  # of an older release
        events_end = splice["events_offset"] + splice["events_bytes"]
        suffix = data[len(data) - splice["suffix_bytes"] :]
        return data[: splice["events_offset"]] + data[events_end : splice["key_offset"]] + suffix
    return data[: splice["offset"]] + data[splice["offset"] + splice["band_bytes"] + splice["event_bytes"] :]
