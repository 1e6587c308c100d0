"""Tests that a broken event anywhere is counted and skipped, and the others are read, in constant memory."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moe_trace.data.schema import BAND_PID
from moe_trace.data.trace_json.decoding import UNREADABLE, decode_batch, decode_one
from moe_trace.data.trace_json.stream import JsonStream
from moe_trace.read.check_inputs import read_checked
from moe_trace.read.reader import TraceSummary, read_summary
from paths import DATA
from tiny_trace import write_tiny

SOURCE = DATA / "h200" / "decode_grouped_mm.pt.trace.json.gz"
INDENTED: dict[str, Any] = {"indent": 2}
COMPACT: dict[str, Any] = {"separators": (",", ":")}


def event(i: int, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": f"op {i}", "pid": 1, "tid": 1, "ts": i, "dur": 1, **more}


# Where a sound event says BREAK, the file says something else: as torch writes names that hold a quote, as a
# crashed writer leaves them, as an encoder without care does.
BREAKS = {
    "a quote": '"',
    "two quotes": '"x"',
    "a quote, then a brace": '"}',
    "a quote, then an event": '"}, {"ph": "X',
    "quoted words, a comma": 'a", "b',
    "a bracket behind a quote": '"}],',
    "a backslash": "\\",
    "a backslash and a letter": "C:\\models",
    "a newline and a quote": '\n"',
}


def written(count: int, broken: list[int], text: str, layout: dict[str, Any]) -> bytes:
    events = [event(i, args={"note": "BREAK"}) if i in broken else event(i) for i in range(count)]
    sound = json.dumps({"schemaVersion": 1, "traceEvents": events, "traceName": "x"}, **layout)
    return sound.replace("BREAK", text).encode()


def read(data: bytes) -> tuple[set[int], int, list[str]]:
    """Times of the events that were read, how many were not, and the top-level keys."""
    stream = JsonStream(io.BytesIO(data).read, "t.json")
    times, unreadable, keys = set(), 0, []
    for key in stream.walk():
        keys.append(key)
        if key != "traceEvents":
            stream.skip()
            continue
        for batch in stream.batches(decode_batch, decode_one):
            unreadable += sum(e is UNREADABLE for e in batch)
            times |= {int(e.ts) for e in batch if e is not UNREADABLE and e.ph == "X"}
    return times, unreadable, keys


@pytest.mark.parametrize("layout", [INDENTED, COMPACT, {}], ids=["indented", "compact", "plain"])
@pytest.mark.parametrize("broken", [[0], [7], [19], [3, 4], [0, 19], list(range(20))], ids=str)
@pytest.mark.parametrize("text", BREAKS)
def test_all_but_the_broken_are_read(text: str, broken: list[int], layout: dict[str, Any]) -> None:
    times, unreadable, keys = read(written(20, broken, BREAKS[text], layout))
    assert times >= set(range(20)) - set(broken)
    assert len(times) + unreadable >= 20, "each is read or counted"
    assert keys == ["schemaVersion", "traceEvents", "traceName"]


def test_lists_of_objects_in_a_broken_batch_are_no_events() -> None:
    nested = {"list": [{"a": i} for i in range(40)], "then": 1}
    events = [event(0, args=nested), event(1, args={"note": "BREAK"}), event(2, args=nested)]
    data = json.dumps({"traceEvents": events, "after": [{"b": 1}, {"c": 2}]}).replace("BREAK", '"')
    assert read(data.encode()) == ({0, 2}, 1, ["traceEvents", "after"])


def test_an_odd_field_with_lists_of_objects_is_one_event() -> None:
    events = [event(0), event(1, id=[{"a": 1}, {"b": 2}, {"c": 3}], dur=2), event(2)]
    assert read(json.dumps({"traceEvents": events}).encode())[:2] == ({0, 1, 2}, 0)


@pytest.mark.parametrize("first", ["the recording", "an event longer than a block"])
def test_what_is_scanned_whole_takes_nothing_broken_with_it(first: str) -> None:
    lists = {"routers": [{"name": "a"}, {"name": "b"}]}
    long = {"moe_trace": lists} if first == "the recording" else {"text": "x" * 9 * 2**20, **lists}
    events = [
        {"ph": "M", "args": long},
        *(event(i, args={"note": "BREAK"} if i in (1, 9) else {}) for i in range(12)),
    ]
    data = json.dumps({"traceEvents": events}).replace("BREAK", 'a "b').encode()
    assert read(data)[:2] == (set(range(12)) - {1, 9}, 2)


def test_a_list_at_the_end_of_a_broken_event_is_not_the_end() -> None:
    events = [event(0), event(1, args={"note": "BREAK", "list": [{"a": 1}]}), event(2)]
    times, unreadable, _ = read(json.dumps({"traceEvents": events}).replace("BREAK", '"').encode())
    assert (times, unreadable) == ({0, 2}, 1)


def test_memory_stays_that_of_a_block() -> None:
    """40 MB behind one odd quote: the buffer must not grow to hold them."""
    line = msgspec.json.encode(event(1)) + b",\n"
    total, widest = 0, 0
    parts = iter(
        [b'{"traceEvents": [', line.replace(b"op 1", b'op "1'), *[line * 1000] * 450, b'{"ph": "M"}]}']
    )
    left = b""

    def take(size: int) -> bytes:
        nonlocal left
        while len(left) < size and (part := next(parts, None)) is not None:
            left += part
        block, left = left[:size], left[size:]
        return block

    stream = JsonStream(take, "t.json")
    for _ in stream.walk():
        for batch in stream.batches(decode_batch, decode_one):
            total += len(batch)
            widest = max(widest, len(stream._data))
    assert total == 1 + 450_000 + 1
    assert widest < 10 * 2**20


@pytest.fixture(scope="module")
def truth() -> TraceSummary:
    return read_summary(SOURCE)


Change = Callable[[bytes], bytes]
FAULTS: dict[str, Change] = {
    "a quote in a name": lambda text: text.replace(b"cudaDeviceSynchronize", b'cuda"Device', 1),
    "a name that is no UTF-8": lambda text: text.replace(b"cudaDeviceSynchronize", b"cuda\xff\xfeDevice", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_real_trace_gives_the_same_phases(fault: str, truth: TraceSummary, tmp_path: Path) -> None:
    text = gzip.decompress(SOURCE.read_bytes())
    changed = FAULTS[fault](text)
    assert changed != text
    path = tmp_path / "t.pt.trace.json"
    path.write_bytes(changed)
    assert read_summary(path).phases == truth.phases


@pytest.mark.parametrize("seed", range(40))
def test_the_recording_is_read_whole_beside_an_odd_event(tmp_path: Path, seed: int) -> None:
    """Its list of routers ends as the list of events does; another tool may have put it anywhere."""
    path, chance = write_tiny(tmp_path / "a.json"), random.Random(seed)
    document = json.loads(path.read_bytes())
    events = chance.sample(document["traceEvents"], len(document["traceEvents"]))
    carrier = next(i for i, one in enumerate(events) if "moe_trace" in one.get("args", {}))
    if chance.random() < 0.5:  # where merging puts it
        events.append(events.pop(carrier))
    place = chance.choice([len(events) - 1, chance.randrange(len(events))])
    bands = sum(one["ph"] in "CX" and one["pid"] == BAND_PID for one in events)
    bands -= events[place]["ph"] in "CX" and events[place]["pid"] == BAND_PID
    events[place] = {**events[place], "pid": 0.0}
    text = json.dumps({**document, "traceEvents": events}, indent=chance.choice([None, 1]))
    path.write_text(text)
    checked = read_checked(path)
    assert (len(checked.recording.samples), len(checked.band)) == (6, bands)
