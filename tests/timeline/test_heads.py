"""Tests that merging adds the same and removes nothing, whatever comes before and after the events."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace.data.errors import MoETraceError, NothingRecorded
from moe_trace.data.schema import Lost, Recording
from moe_trace.read.file.trace_file import read_trace
from moe_trace.read.reader import read_recording
from moe_trace.timeline.merge import merge_recording
from spliced import without_additions
from tiny_trace import BASE_NS, events, router, sample

QUOTED = json.dumps({"traceEvents": [{"ph": "X", "name": "a"}], "baseTimeNanoseconds": 1, "moe_trace": [{}]})
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, width=32)
texts = st.text(max_size=8) | st.sampled_from(
    ["}]", "]", "[{", "}],", '"traceEvents": [', QUOTED, QUOTED * 40]
)
values = st.recursive(
    scalars | texts | st.just("x" * 70_000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
OTHER_KEYS = ["distributedInfo", "deviceProperties", "moe_trace"]
KEPT = ("traceEvents", "baseTimeNanoseconds", "schemaVersion")
others = st.lists(
    st.tuples(
        (texts | st.sampled_from(OTHER_KEYS)).filter(lambda k: k not in KEPT),
        values,
    ),
    max_size=4,
    unique_by=lambda pair: pair[0],
)


def recording() -> Recording:
    infos = [router(0), router(1)]
    return Recording(
        model={"name": "tiny"},
        options={},
        routers=tuple(infos),
        samples=tuple(sample(info, 0, 200.0 * info.layer) for info in infos),
        lost=Lost(),
        versions={"torch": "2.13.0"},
    )


def written(value: Any, *, style: dict[str, Any], crlf: bool, bom: bool, escaped: bool) -> bytes:
    text = json.dumps(value, **style)
    if escaped:
        text = text.replace('"traceEvents":', '"trace\\u0045vents":', 1)
    if crlf:
        text = text.replace("\n", "\r\n")
    return (b"\xef\xbb\xbf" if bom else b"") + text.encode("utf-8", "surrogatepass")


@settings(deadline=None, max_examples=150)
@given(
    others,
    st.permutations(range(3)),
    st.integers(0, 4),
    st.sampled_from(
        [{}, {"indent": 1}, {"indent": "\t"}, {"separators": (",", ":")}, {"ensure_ascii": False}]
    ),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_head_and_tail(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, Any]],
    order: list[int],
    cut: int,
    style: dict[str, Any],
    crlf: bool,
    bom: bool,
    escaped: bool,
    packed: bool,
) -> None:
    kept = [
        ("schemaVersion", 1),
        ("baseTimeNanoseconds", BASE_NS),
        (
            "traceEvents",
            [e for layer in (0, 1) for e in events(f"L{layer:02d}", 200.0 * layer, 1 + 100 * layer)],
        ),
    ]
    whole = dict(pairs[:cut] + [kept[i] for i in order] + pairs[cut:])
    escaped &= not any("traceEvents" in json.dumps(pair) for pair in pairs)
    before = written(whole, style=style, crlf=crlf, bom=bom, escaped=escaped)
    try:
        before.decode()
    except UnicodeDecodeError:
        return
    path = tmp_path_factory.mktemp("heads") / "a.json"
    path.write_bytes(gzip.compress(before) if packed else before)
    merge_recording(path, [recording()])
    merge_recording(path, [recording()])  # what is merged twice is there once
    samples = read_recording(path).samples
    assert [s.placement is not None for s in samples] == [True, True]
    merged = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    found = json.loads(merged.decode("utf-8-sig"))
    theirs = json.loads(before.decode("utf-8-sig"))
    count = len(theirs["traceEvents"])
    assert found["traceEvents"][:count] == theirs["traceEvents"]
    assert {k: v for k, v in found.items() if k != "traceEvents"} == {
        k: v for k, v in theirs.items() if k != "traceEvents"
    }
    plain = path.with_name("plain.json")
    plain.write_bytes(merged.removeprefix(b"\xef\xbb\xbf"))
    assert len(found["traceEvents"]) > count
    if not bom:
        assert without_additions(plain) == before


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("", '"baseTimeNanoseconds": 7'),
        ("", '"baseTimeNanoseconds": "none"'),
        ('"baseTimeNanoseconds": {"a": [7]},', ""),
        ("", '"moe_trace": {"a": [1]}'),
        ("", '"moe_trace": 1, "moe_trace": [{}]'),
        ('"moe_trace": "mine",', '"deviceProperties": [{"id": 0, "baseTimeNanoseconds": 3}]'),
    ],
)
@pytest.mark.parametrize(
    "user_event",
    [{"ph": "M", "args": {"moe_trace": {"a": [1]}}}, {"ph": "i", "args": {"moe_trace": "text", "l": [{}]}}],
)
def test_keys_of_the_users_that_are_called_like_ours(
    tmp_path: Path, before: str, behind: str, user_event: dict[str, Any]
) -> None:
    user_event = {"name": "note", "ts": 100.0, "pid": 1, "tid": 1, **user_event}
    found = [user_event, *events("L00", 0.0, 1), *events("L01", 200.0, 101)]
    head, behind = f'{{{before} "baseTimeNanoseconds": {BASE_NS}', f", {behind}" if behind else ""
    path = tmp_path / "a.json"
    path.write_text(f'{head}, "traceEvents": {json.dumps(found)}{behind}}}')
    original = path.read_bytes()
    for _ in range(2):
        merge_recording(path, [recording()])
        for read in (read_recording(path), read_trace(path).recording):
            assert [s.placement is not None for s in read.samples] == [True, True]
    assert without_additions(path) == original
    merged = json.loads(path.read_bytes())
    path.write_text(json.dumps(merged | {"baseTimeNanoseconds": BASE_NS}))  # saved again by another tool
    merge_recording(path, [recording()])
    again = json.loads(path.read_bytes())
    assert again["traceEvents"][:-1] == merged["traceEvents"][:-1]  # the last tells where it stands
    assert len(again["traceEvents"]) == len(merged["traceEvents"])
    assert again.keys() == merged.keys()


@pytest.mark.parametrize("profiler_span", [True, False])
@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_samples_of_another_time_are_refused(tmp_path: Path, profiler_span: bool, seconds: int) -> None:
    found = events("L00", 0.0, 1) + events("L01", 200.0, 101)
    if profiler_span:
        found.append(
            {
                "ph": "X",
                "cat": "Trace",
                "name": "PyTorch Profiler (0)",
                "ts": 0,
                "dur": 2000,
                "pid": "Spans",
                "tid": 1,
            }
        )
    path = tmp_path / "a.json"
    base = BASE_NS + seconds * 1_000_000_000
    for event in found:  # no ranges of ours, so that the clock alone tells
        event["name"] = event["name"].replace("moe.", "other.")
    path.write_text(json.dumps({"schemaVersion": 1, "baseTimeNanoseconds": base, "traceEvents": found}))
    before = path.read_bytes()
    with pytest.raises(NothingRecorded, match="none of the samples"):
        merge_recording(path, [recording()])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"a": [1, 2]}',
        '{"traceEvents": 3}',
        '{"traceEvents": [], "a": }',
        '{"traceEvents": [{}',
        "null",
    ],
)
def test_what_is_no_trace_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(MoETraceError):
        merge_recording(path, [recording()])
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]
