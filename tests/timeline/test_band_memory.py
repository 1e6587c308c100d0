"""Tests that merging allocates few objects that the garbage collector tracks."""

from __future__ import annotations

import gc
from pathlib import Path

from moe_trace.data.calls.table import CallTable
from moe_trace.data.codec import encode_recording
from moe_trace.read.reader import read_recording
from moe_trace.timeline.counter_tracks import band_events
from moe_trace.timeline.placed_calls import PlacedCalls

TRACE = Path(__file__).parents[1] / "data/h200/train_grouped_mm.pt.trace.json.gz"


def test_encoding_thousands_of_calls_sets_off_few_collections() -> None:
    """A full one walks all objects of the user's model, and takes longer than the merge."""
    recording = read_recording(TRACE)
    calls = CallTable.concatenated([recording.calls] * (3000 // len(recording.calls)))
    object.__setattr__(recording, "samples", calls)
    collections = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collections.append(info["generation"])

    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(700, 10, 10)
    gc.callbacks.append(count)
    try:
        for _ in range(2):  # the first fills the interpreter's free lists, which counts as well
            collections.clear()
            events = list(band_events(PlacedCalls.of(calls), rank=0))
            encoded = encode_recording(recording)
    finally:
        gc.callbacks.remove(count)
        gc.set_threshold(*thresholds)
    assert len(events) > 5 * len(calls) and len(encoded) > 300 * len(calls)
    # One container a call that lives on would be more than four of them.
    assert len(collections) <= 4, collections
