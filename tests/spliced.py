"""The bytes of a merged trace that the profiler itself wrote."""

from __future__ import annotations

import json
from pathlib import Path


def without_additions(path: Path) -> bytes:
    """The original bytes, by the offsets that the file itself tells."""
    data = path.read_bytes()
    splice = json.loads(data)["moe_trace"]["splice"]
    events_end = splice["events_offset"] + splice["events_bytes"]
    suffix = data[len(data) - splice["suffix_bytes"] :]
    return data[: splice["events_offset"]] + data[events_end : splice["key_offset"]] + suffix
