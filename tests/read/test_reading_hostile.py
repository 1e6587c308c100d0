"""Tests of truncated, foreign, empty and hostile files: a clear error or a report, never a traceback."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_trace.cli import main
from moe_trace.data.errors import MoETraceError
from moe_trace.read.reader import read_recording, read_summary
from moe_trace.show.csv import render_csv
from moe_trace.show.html import render_fragment, render_page
from moe_trace.show.json import render_json
from moe_trace.show.text import render_text
from tiny_trace import write_tiny

HTML_NAME = "</script><img src=x onerror=alert(1)>"
READERS = ("report", "check")


def run(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


class Quiet(bytes):
    """Bytes that a failing property does not print."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes of a trace>"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    return Quiet(write_tiny(tmp_path_factory.mktemp("t") / "a.json").read_bytes())


CORPUS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "blank": (b"\n\n  ", "empty file"),
    "text": (b"hello world", "expected the Chrome trace JSON"),
    "array": (b'[{"ph": "X", "ts": 1}]', "expected the Chrome trace JSON"),
    "no events": (b'{"schemaVersion": 1}', "without `traceEvents`"),
    "not merged": (b'{"traceEvents": []}', "without moe_trace data"),
    "other tool": (
        b'{"displayTimeUnit": "ns", "traceEvents": [{"ph": "B", "ts": 1, "name": "x"}]}',
        "without moe",
    ),
    "null data": (b'{"traceEvents": [], "moe_trace": null}', "schema version None"),
    "next version": (b'{"traceEvents": [], "moe_trace": {"schema_version": 99}}', "schema version 99"),
    "no samples": (b'{"traceEvents": [], "moe_trace": {"schema_version": 1}}', "does not follow"),
    "deep": (b'{"traceEvents": [], "moe_trace": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "moe_trace data"),
    "gzip of nothing": (gzip.compress(b""), "empty file"),
    "cut gzip": (gzip.compress(b'{"traceEvents": []}' * 99)[:-9], "gzip data is broken"),
    "broken gzip": (b"\x1f\x8b" + b"nonsense" * 9, "gzip data is broken"),
    "binary": (bytes(range(256)), "expected the Chrome trace JSON"),
    "nul": (b'{"traceEvents": [' + b"\0" * 100, "too early"),
}


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("name", sorted(CORPUS))
def test_corpus(tmp_path: Path, command: str, name: str) -> None:
    data, message = CORPUS[name]
    file = tmp_path / "bad.json"
    file.write_bytes(data)
    code, out, err = run(command, str(file))
    assert (code, out) == (5, "")
    assert err.startswith("moe-trace: error: ") and message in err and "Traceback" not in err
    assert "bad.json" in err


@pytest.mark.parametrize("command", READERS)
def test_missing_and_empty_folder(tmp_path: Path, command: str) -> None:
    code, _, err = run(command, str(tmp_path / "none.json"))
    assert code == 5 and "No such file" in err
    code, _, err = run(command, str(tmp_path))
    assert code == 5 and "found no trace" in err


@pytest.mark.parametrize("gz", [False, True])
def test_truncated_anywhere(tmp_path: Path, merged: Quiet, gz: bool) -> None:
    data = gzip.compress(merged) if gz else merged
    file = tmp_path / "cut.json"
    for cut in range(1, len(data) - 1, max(1, len(data) // 60)):
        file.write_bytes(data[:cut])
        code, _, err = run("report", str(file))
        assert code == 5 and "cut.json" in err and "Traceback" not in err, cut


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=20),
    st.just(HTML_NAME),
    st.just([[[[[]]]]]),
    st.just({"a": {"b": []}}),
    st.just("9" * 400),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into the JSON."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_replaced_by_an_odd_one(tmp_path: Path, merged: Quiet, data: st.DataObject) -> None:
    document = json.loads(merged)
    if data.draw(st.booleans()):
        document["traceEvents"] = data.draw(st.permutations(document["traceEvents"]))[:40]
    path = data.draw(st.sampled_from(places(document)))
    text = json.dumps(replaced(document, path, data.draw(odd)), indent=data.draw(st.sampled_from([None, 1])))
    file = tmp_path / "odd.json"
    file.write_text(text, encoding="utf-8", errors="replace")
    try:
        summary = read_summary(file)
    except MoETraceError as error:
        assert str(error)
        return
    assert render_text(summary)
    json.loads(render_json(summary), parse_constant=pytest.fail)
    render_csv([summary])
    assert HTML_NAME not in render_fragment(summary)
    render_page([summary])
    code, _, err = run("check", str(file))
    assert code in (0, 1) and not err


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_changed(tmp_path: Path, merged: Quiet, data: st.DataObject) -> None:
    broken = bytearray(merged)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(broken) - 1))
        broken[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=8))
    file = tmp_path / "bytes.json"
    file.write_bytes(broken)
    for command in READERS:
        code, _, err = run(command, str(file))
        assert code in (0, 1, 5) and "Traceback" not in err


def with_text(merged: bytes, change: Callable[[str], str]) -> bytes:
    return change(merged.decode()).encode("utf-8", "surrogateescape")


def test_events_that_a_strict_parser_refuses(tmp_path: Path, merged: Quiet) -> None:
    """NaN, control characters, huge numbers, odd types: those events are counted, the others are read."""
    plain = tmp_path / "plain.json"
    plain.write_bytes(merged)
    file = tmp_path / "odd.json"
    events = (
        '{"ph": "X", "cat": "kernel", "name": "tab\tin name", "ts": 1, "dur": 1, "pid": 0, "tid": 3},'
        '{"ph": "X", "cat": "kernel", "name": "nan", "ts": NaN, "dur": 1, "pid": 0, "tid": 3},'
        '{"ph": "X", "cat": "kernel", "name": "huge", "ts": 1e999, "dur": 1, "pid": 0, "tid": 3},'
        '{"ph": "X", "cat": "kernel", "name": "big", "ts": 1e300, "dur": 1, "pid": 0, "tid": 3},'
        '{"ph": "X", "cat": "kernel", "name": "args", "ts": 1, "dur": 1, "pid": 0, "tid": 3, "args": [1]},'
        '{"ph": "X", "cat": "kernel", "name": "time", "ts": "soon", "dur": 1, "pid": 0, "tid": 3},'
        '{"ph": "X", "cat": "kernel", "name": "back", "ts": 1, "dur": -1, "pid": 0, "tid": 3},'
    )
    file.write_bytes(
        with_text(merged, lambda text: text.replace('"traceEvents": [', f'"traceEvents": [{events}'))
    )
    expected, found = read_summary(plain), read_summary(file)
    assert found.routers == expected.routers
    assert found.notes[0].startswith("5 events of the trace could not be read")
    assert found.phases is not None and expected.phases is not None
    work = expected.phases.whole.model_work_us
    assert found.phases.whole.model_work_us == pytest.approx((work or 0) + 2), "the two sound ones count"


def test_deep_nesting_in_an_event(tmp_path: Path, merged: Quiet) -> None:
    deep = '{"ph": "X", "args": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}},"
    file = tmp_path / "deep.json"
    file.write_bytes(
        with_text(merged, lambda text: text.replace('"traceEvents": [', '"traceEvents": [' + deep))
    )
    assert read_summary(file).totals.calls == 6
    assert len(read_recording(file).samples) == 6


def test_names_never_reach_a_page_unescaped(tmp_path: Path) -> None:
    names = [HTML_NAME, "<b>&amp;\u2028`x`"]
    model = {"name": HTML_NAME, "class": HTML_NAME, "dtype": HTML_NAME, "hidden_size": 8}
    file = write_tiny(tmp_path / "x.json", model=model, sites=names, devices=[HTML_NAME], calls=12)
    summary = read_summary(file)
    for page in (render_page([summary]), render_fragment(summary)):
        ours = page.replace(bundle(page), "")
        assert "<img src=x" not in ours and "onerror=alert(1)>" not in ours.replace("&gt;", "")
        assert ours.count("</script") == (4 if "<!DOCTYPE" in page else 0)
    code, out, _ = run("report", str(file))
    assert code == 0 and out.isprintable() is False and "\x1b" not in out


def bundle(page: str) -> str:
    """Plotly's own text in the page."""
    start = page.find("<script>")
    return page[start : page.find("</script>", start)] if start >= 0 else ""


def test_control_codes_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "L00\x1b[2J\x07\r"
    file = write_tiny(tmp_path / "x.json", sites=[evil, "L01"], model={"name": "m\x1b]0;owned\x07"})
    for arguments in (["report", str(file)], ["check", str(file)], ["diff", str(file), str(file), "--all"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert not {c for c in out if not c.isprintable()} - {"\n"}


def test_formulas_do_not_reach_a_spreadsheet(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "x.json", sites=["=cmd|' /C calc'!A0", "L01"])
    code, out, _ = run("report", str(file), "--format", "csv")
    assert code == 0 and "\n=cmd" not in out and ",=cmd" not in out and "'=cmd" in out


def test_a_pass_that_not_every_layer_has(tmp_path: Path, merged: bytes) -> None:
    document = json.loads(merged)
    carrier = [e for e in document["traceEvents"] if "moe_trace" in e.get("args", {})][-1]
    carrier["args"]["moe_trace"]["samples"]["phase"][1] = "recompute"
    file = tmp_path / "some.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    summary = read_summary(file)
    assert render_page([summary]) and render_text(summary)
