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
    data = io.BytesIO(b'{"traceEvents": [], "frames": [' + frame * (10 * block // len(frame)) + b"{}]}")
    stream = JsonStream(data.read, "a")
    peaks = {}
    for key in stream.walk():
        tracemalloc.start()
        stream.skip()
        peaks[key] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks["frames"] < 4 * block


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
