"""Tests that the browser helpers distinguish pages that show something from empty ones, on a hand-made trace.

The trace has round numbers: one CPU operation of 100 ms, and a process "Made by hand" whose tracks each
differ in one property. Our process in real traces must work with how the viewer draws these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Error, Page

from .conftest import require_chromium
from .harness import Internet, tensorboard, wait_until
from .trace_view import drawn_columns, open_trace_view, search, select_next_hit, track_names

pytestmark = pytest.mark.browser

HAND = 9_000_000
SPAN_US = 100_000


def meta(name: str, tid: int, /, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": HAND, "tid": tid, "ts": 0, "args": args}


def counter(name: str, ts: int, value: float) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": HAND, "tid": 0, "ts": ts, "args": {"value": value}}


def slice_(name: str, tid: int, ts: int, dur: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": "test",
        "name": name,
        "pid": HAND,
        "tid": tid,
        "ts": ts,
        "dur": dur,
        "args": {"a": 7},
    }


def hand_made_trace() -> dict[str, Any]:
    operation = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 0, "dur": SPAN_US}
    everywhere = {"ph": "i", "s": "g", "name": "instant", "pid": 1, "tid": 1, "ts": 0}
    band = [
        meta("process_name", 0, name="Made by hand"),
        meta("process_sort_index", 0, sort_index=-1),
        meta("thread_name", 1, name="second lane"),
        meta("thread_sort_index", 1, sort_index=2),
        meta("thread_name", 2, name="first lane"),
        meta("thread_sort_index", 2, sort_index=1),
        slice_("late", 1, SPAN_US // 2, SPAN_US // 4),
        slice_("early", 2, 0, SPAN_US // 4),
        counter("step ÷", SPAN_US // 4, 2.5),
        counter("step ÷", SPAN_US // 2, 0),
        counter("single event", SPAN_US // 4, 2.5),
    ]
    return {"schemaVersion": 1, "traceEvents": [operation, everywhere, *band]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    logdir = tmp_path_factory.mktemp("logs")
    (logdir / "hand").mkdir()
    (logdir / "hand" / "worker.1.pt.trace.json").write_text(json.dumps(hand_made_trace()))
    with tensorboard(logdir, tmp_path_factory.mktemp("scratch")) as address:
        yield address


def test_tracks_are_listed_in_the_order_of_the_page(page: Page, url: str) -> None:
    open_trace_view(page, url, "hand")
    assert track_names(page, "Made by hand") == ["single event", "step ÷", "first lane", "second lane"]
    assert track_names(page)[:4] == track_names(page, "Made by hand")
    assert track_names(page, "no such process") == []


def test_drawn_columns_measure_what_is_drawn(page: Page, url: str) -> None:
    open_trace_view(page, url, "hand")
    columns = {name: n for (process, name), n in drawn_columns(page).items() if "Made by hand" in process}
    quarter = columns["first lane"]
    assert quarter > 100
    assert columns["second lane"] == pytest.approx(quarter, rel=0.05)
    assert columns["step ÷"] == pytest.approx(quarter, rel=0.05)
    assert columns["single event"] == 0, "a counter needs a second event to be drawn"


def test_search_finds_slices_and_the_panel_shows_them(page: Page, url: str) -> None:
    open_trace_view(page, url, "hand")
    assert search(page, "nowhere") == 0
    assert search(page, "early") == 1
    assert "Title early" in select_next_hit(page)


def test_requests_to_the_outside_are_refused_and_remembered(page: Page, internet: Internet) -> None:
    with pytest.raises(Error, match="ERR_FAILED"):
        page.goto("https://example.invalid/")
    assert internet.refused == ["https://example.invalid/"]
    internet.refused.clear()


def test_tensorboard_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="TensorBoard ended with status"),
        tensorboard(tmp_path, tmp_path, "--no-such-flag"),
    ):
        pass


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_chromium_ci_fails_and_others_skip(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(outcome, match="found no Chromium"):
        require_chromium()


def test_wait_names_what_never_came() -> None:
    with pytest.raises(TimeoutError, match="a miracle"):
        wait_until(lambda: None, "a miracle", timeout_s=0.0)
