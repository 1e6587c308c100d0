"""Tests that streaming finds the same values and events as `json`, however the file is formatted or cut."""

from __future__ import annotations

import gzip
import io
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace.data.errors import TraceFileError
from moe_trace.data.trace_json import cursor as stream_module
from moe_trace.data.trace_json.stream import JsonStream
from moe_trace.read.file.trace_file import read_trace

scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, width=32)
texts = st.text(max_size=12) | st.sampled_from(['"},', "}", "]", "[{", '\\"', "\\", "},\n  {", "é\u2028"])
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, values, max_size=4)
documents = st.builds(
    lambda before, events, after: {**before, "traceEvents": events, **after},
    st.dictionaries(texts.filter(lambda t: t != "traceEvents"), values, max_size=2),
    st.lists(objects, max_size=12),
    st.dictionaries(texts.filter(lambda t: t != "traceEvents"), values, max_size=2),
)
styles = st.sampled_from(
    [{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False, "indent": 2}]
)


def read_all(
    data: bytes, block: int, one: Callable[[bytes], Any] = json.loads
) -> tuple[dict[str, Any], list[Any]]:
    before = stream_module.BLOCK_BYTES
    stream_module.BLOCK_BYTES = block
    try:
        stream = JsonStream(io.BytesIO(data).read, "a.json")
        found: dict[str, Any] = {}
        events: list[Any] = []
        for key in stream.walk():
            if key == "traceEvents":
                for batch in stream.batches(msgspec.json.Decoder(list[dict]).decode, one):
                    assert batch, "a batch always makes progress"
                    events += batch
            elif len(key) % 2:
                stream.skip()
            else:
                found[key] = json.loads(stream.value())
        return found, events
    finally:
        stream_module.BLOCK_BYTES = before


@settings(deadline=None, max_examples=300)
@given(documents, styles, st.integers(1, 200))
def test_same_as_json(document: dict[str, Any], style: dict[str, Any], block: int) -> None:
    data = json.dumps(document, **style).encode("utf-8", "surrogatepass")
    try:
        data.decode()
    except UnicodeDecodeError:
        return
    found, events = read_all(data, block)
    assert events == document["traceEvents"]
    assert found == {k: v for k, v in document.items() if k != "traceEvents" and len(k) % 2 == 0}


@settings(deadline=None, max_examples=200)
@given(documents, st.integers(1, 64), st.data())
def test_every_truncation_is_noticed(document: dict[str, Any], block: int, data: st.DataObject) -> None:
    text = json.dumps(document).encode()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(TraceFileError, match=r"a\.json"):
        read_all(text[:cut], block, lambda broken: None)  # as readers do, which count it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b"[1, 2]", "expected the Chrome trace JSON"),
        (b"hello", "expected the Chrome trace JSON"),
        (b'{"traceEvents": [{}] "a": 1}', "a comma or the end"),
        (b'{"traceEvents": [{}]} trailing', "the end of the file"),
        (b'{"traceEvents": 3}', "'\\['"),
        (b'{"traceEvents": [1]}', "an event"),
        (b'{"a" 1}', "':'"),
        (b"{3: 1}", "a key"),
        (b'{"a": }', "a value"),
    ],
)
def test_errors_say_what_was_expected(text: bytes, message: str) -> None:
    with pytest.raises(TraceFileError, match=message):
        read_all(text, 16)


def test_events_without_a_comma_between_them_are_one_broken_event() -> None:
    refused: list[bytes] = []
    stream = JsonStream(io.BytesIO(b'{"traceEvents": [{"a": 1}, {} {}, {"b": 2}]}').read, "a.json")
    assert next(stream.walk()) == "traceEvents"
    decode = msgspec.json.Decoder(list[dict]).decode
    events = [e for batch in stream.batches(decode, lambda text: refused.append(text)) for e in batch]
    assert refused == [b"{} {}"] and events == [{"a": 1}, None, {"b": 2}]


def test_work_grows_linearly_with_one_huge_value() -> None:
    """A value of many blocks is read by doubling, not block by block from its start."""
    reads: list[int] = []
    data = io.BytesIO(b'{"a": "' + b"x" * 300_000 + b'", "traceEvents": []}')

    def read(size: int) -> bytes:
        reads.append(size)
        return data.read(size)

    stream_module.BLOCK_BYTES, before = 64, stream_module.BLOCK_BYTES
    try:
        stream = JsonStream(read, "a")
        for _ in stream.walk():
            stream.skip()
    finally:
        stream_module.BLOCK_BYTES = before
    assert len(reads) < 60


def test_a_value_that_is_skipped_behind_the_events_is_not_held() -> None:
    """Other tools write tables there that are larger than the events, such as `stackFrames`."""
    block, frame = stream_module.BLOCK_BYTES, b'{"name": "' + b"}]," * 30_000 + b'"}, '
    frames, numbers = frame * (10 * block // len(frame)), b"1," * (5 * block)
    data = io.BytesIO(b'{"traceEvents": [], "frames": [%b{}], "numbers": [%b1]}' % (frames, numbers))
    stream = JsonStream(data.read, "a")
    peaks = {}
    for key in stream.walk():
        tracemalloc.start()
        stream.skip()
        peaks[key] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(peaks["frames"], peaks["numbers"]) < 4 * block


@pytest.mark.parametrize(("events", "objects"), [(200, 100), (100, 200), (3000, 300), (1, 5000)])
def test_lists_of_objects_inside_events_are_not_taken_for_events(events: int, objects: int) -> None:
    event = {"name": "e", "args": {"list": [{"x": 1}] * objects}}
    text = json.dumps({"traceEvents": [event] * events, "after": 1}).encode()
    for read in (elements_of, batches_of):
        found = read(text)
        assert len(found) == events and found[0] == found[-1] == event


def elements_of(text: bytes) -> list[Any]:
    stream = JsonStream(io.BytesIO(text).read, "a")
    elements: list[tuple[int, bytes]] = []
    for key in stream.walk():
        if key == "traceEvents":
            elements += stream.elements()
        else:
            stream.skip()
    assert all(text[at : at + len(element)] == element for at, element in elements)
    return [json.loads(element) for _, element in elements]


def batches_of(text: bytes) -> list[Any]:
    stream, decode = JsonStream(io.BytesIO(text).read, "a"), msgspec.json.Decoder(list[dict]).decode
    found = []
    for key in stream.walk():
        if key == "traceEvents":
            found += [one for batch in stream.batches(decode, json.loads) for one in batch]
        else:
            stream.skip()
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("blanks", [0, 5_000_000])
def test_errors_name_the_byte_where_reading_stopped(tmp_path: Path, blanks: int, packed: bool) -> None:
    """Counted in the JSON: a packed file's own bytes tell nobody anything."""
    path = tmp_path / "a.json"
    head = b'{"a": 1,' + b" " * blanks + b'"traceEvents": []'
    for end, said in ((b" !}", f"at byte {len(head) + 1:,}, found '!}}'"), (b"", f"at byte {len(head):,}, ")):
        path.write_bytes(gzip.compress(head + end) if packed else head + end)
        with pytest.raises(TraceFileError, match=re.escape(said)):
            read_trace(path)
