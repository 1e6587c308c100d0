"""Traces x viewers: tests that each viewer shows what is promised, without an error on the page.

Each cell leaves a screenshot, `screenshots/matrix_TRACE_VIEWER.png`.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackDescriptor
from playwright.sync_api import Browser, Frame, FrameLocator, Page

from moe_trace.cli import main
from moe_trace.read.reader import read_summary
from moe_trace.show.viewer import TraceServer, find_trace_viewer

from .harness import tensorboard, wait_until
from .matrix_traces import ENDING, NAMES, Held, read_plainly, write_trace
from .moe_tab import Watch, open_view, switch_view, undrawn_plots
from .test_tensorboard import keep_screenshot
from .trace_view import (
    Track,
    choose_view,
    drawn_columns,
    open_profiler_view,
    tracks,
    wait_for_timeline,
)

pytestmark = pytest.mark.browser

BAND = "MoE routing"
PROMISED = {"load max÷mean", "active experts"}
VIEW_LABELS = {"Kernel": "GPU Kernel"}  # what the page calls them
ALL_ROWS = {"width": 1600, "height": 1700}  # what is not on the screen is not drawn
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
TAB_VIEWS = ("overview", "routing", "time", "timeline")


@dataclass(frozen=True)
class Board:
    """A TensorBoard with a run for each trace."""

    url: str
    logdir: Path
    read: dict[str, Held] = field(default_factory=dict)

    def trace(self, name: str) -> Path:
        return next((self.logdir / name).glob(f"*{ENDING}"))

    def held(self, name: str) -> Held:
        if name not in self.read:
            self.read[name] = read_plainly(self.trace(name))
        return self.read[name]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    logdir = tmp_path_factory.mktemp("logs")
    for name in NAMES:
        write_trace(name, logdir / name)
    with tensorboard(logdir, tmp_path_factory.mktemp("scratch")) as url:
        yield Board(url, logdir)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def held(board: Board, name: str) -> Held:
    found = board.held(name)
    assert missing(found.counters) == set() and found.lanes, name
    return found


def missing(counters: set[str]) -> set[str]:
    """Promised counters without any. Calls inside a graph share its time: `active experts (graph: mean)`."""
    return {name for name in PROMISED if not any(counter.startswith(name) for counter in counters)}


@pytest.fixture
def watch(page: Page) -> Iterator[Watch]:
    """The page of the test; afterwards nothing may have been wrong with it."""
    found = Watch()
    found.attach(page)
    yield found
    assert found.errors == []


# -- torch-tb-profiler ---------------------------------------------------------------------------------


def test_views_of_torch_tb_profiler(page: Page, watch: Watch, board: Board, name: str, held: Held) -> None:
    profiler = open_profiler_view(page, board.url, name, "Overview")  # waits until the run is loaded
    (span,) = profiler_data(board, "spans", run=name, worker=name)
    check_overview(profiler, held, profiler_data(board, "overview", run=name, worker=name, span=span))
    keep_screenshot(page, f"matrix_{name}_tb_overview")
    views = set(profiler_data(board, "views", run=name))
    assert views >= {"Overview", "Operator", "Trace"} | ({"Kernel"} if held.on_gpu else set())
    for view in sorted(views & set(CHECKS)):
        choose_view(profiler, VIEW_LABELS.get(view, view))
        CHECKS[view](profiler, held)
        keep_screenshot(page, f"matrix_{name}_tb_{view.lower()}")
    page.set_viewport_size(ALL_ROWS)
    choose_view(profiler, "Trace")
    check_timeline(page, held, f"matrix_{name}_tb_trace")


def profiler_data(board: Board, route: str, **query: str) -> Any:
    """What the page gets from torch-tb-profiler: its charts are drawn by a script of the internet."""
    with urlopen(
        f"{board.url}/data/plugin/pytorch_profiler/{route}?{urlencode(query)}", timeout=60
    ) as answer:
        return json.load(answer)


def check_overview(profiler: FrameLocator, held: Held, data: Any) -> None:
    profiler.get_by_text("Step Time Breakdown").wait_for()
    profiler.get_by_text("GPU" if held.on_gpu else "CPU", exact=True).first.wait_for()
    assert {"title": "Device Type", "value": "GPU" if held.on_gpu else "CPU"} in data["environments"]
    costs = {part["name"]: part["value"] for part in data["performance"][0]["children"]}
    assert costs["Kernel" if held.on_gpu else "CPU Exec"] > 0
    assert len(data["steps"]["rows"]) >= 1


def check_operators(profiler: FrameLocator, held: Held) -> None:
    profiler.get_by_text("Operator View").first.wait_for()
    found = wait_until(lambda: shown_counts(profiler, held), "the table of operators")
    for operator, count in found.items():
        assert held.outer_operators[operator] <= count <= held.operators[operator], operator


def shown_counts(profiler: FrameLocator, held: Held) -> dict[str, int] | None:
    rows = [re.split(r"\s+", text.strip()) for text in profiler.locator("tbody tr").all_inner_texts()]
    found = {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[0] in held.operators}
    return found if len(found) >= min(5, len(held.operators)) else None


def check_kernels(profiler: FrameLocator, held: Held) -> None:
    profiler.get_by_text("Kernel View").first.wait_for()

    def enough() -> bool:
        words = " ".join(profiler.locator("table").all_inner_texts())
        return sum(kernel[:60] in words for kernel in held.kernels) >= min(5, len(held.kernels))

    wait_until(enough, "the table of kernels")


def check_memory(profiler: FrameLocator, held: Held) -> None:
    profiler.get_by_text("Memory View").first.wait_for()
    rows = profiler.locator("tbody tr")

    def named() -> set[str]:
        return set(held.operators) & {row.split()[0] for row in rows.all_inner_texts() if row.split()}

    wait_until(named, "the operators that hold memory")


def check_modules(profiler: FrameLocator, held: Held) -> None:
    profiler.get_by_text("OlmoeTopKRouter").first.wait_for(state="attached")  # the title of a bar


CHECKS = {
    "Operator": check_operators,
    "Kernel": check_kernels,
    "Memory": check_memory,
    "Module": check_modules,
}


# -- timelines -----------------------------------------------------------------------------------------


def check_timeline(page: Page, held: Held, shot: str) -> None:
    """Counters and lanes of ours above all else, all of them drawn, and the device's rows below."""
    picture = wait_for_timeline(page)
    keep_screenshot(page, shot, picture)
    rows, drawn = tracks(page), drawn_columns(page, picture)
    ours = [row for row in rows if BAND in row.process]
    assert {row.name for row in ours} == held.counters | held.lanes
    assert [row for row in rows[: len(ours)] if BAND not in row.process] == [], "the band is on top"
    assert [key for key, columns in drawn.items() if BAND in key[0] and columns == 0] == []
    if held.on_gpu:
        assert gpu_rows(rows, drawn), "GPU rows below the band"
        assert max(row.bottom for row in ours) < max(row.top for row in gpu_rows(rows, drawn))


def gpu_rows(rows: list[Track], drawn: dict[tuple[str, str], int]) -> list[Track]:
    return [row for row in rows if "GPU" in row.process and drawn[row.process, row.name]]


def test_bundled_viewer_alone(page: Page, watch: Watch, board: Board, name: str, held: Held) -> None:
    """As `moe-trace view TRACE` shows it: everything comes from this machine."""
    page.set_viewport_size(ALL_ROWS)
    with served(board.trace(name)) as address:
        page.goto(address)
        check_timeline(page, held, f"matrix_{name}_viewer")
    assert watch.outside == []


@contextmanager
def served(trace: Path) -> Iterator[str]:
    viewer = find_trace_viewer()
    assert viewer is not None
    with TraceServer(trace, viewer, host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()


# -- ours ----------------------------------------------------------------------------------------------


def test_moe_tab(page: Page, watch: Watch, board: Board, name: str) -> None:
    """All views in the light theme, then all in the dark: chosen as a user does, on one page."""
    frame = open_view(page, board.url, "overview", run=name)
    calls = read_summary(board.trace(name)).totals.calls
    assert frame.locator("[data-label=calls]").get_attribute("data-value") == str(calls)
    for theme in THEMES:
        page.evaluate("dark => document.body.classList.toggle('dark-mode', dark)", theme == "dark")
        frame.wait_for_function(f"() => document.documentElement.dataset.theme === '{theme}'")
        for view in TAB_VIEWS:
            switch_view(frame, view)
            check_view(frame, view)
            keep_screenshot(page, f"matrix_{name}_tab_{view}_{theme}")
    assert watch.outside == []


def check_view(frame: Frame, view: str) -> None:
    assert undrawn_plots(frame) == [] and frame.locator(".problem").count() == 0, view
    assert frame.evaluate("() => window.scrollY") == 0, "a view begins at its head"
    figures = frame.locator("figure").count()
    if view in ("time", "timeline") and not figures:
        assert "CUDA graph" in frame.locator("main").inner_text()
    elif view == "timeline":
        assert len(set(bar_colours(frame))) == len(bar_colours(frame)) >= 2, "phases are told apart"
    elif view == "overview":
        assert frame.locator(".card").count() >= 5
        said = frame.locator(".findings li").count()
        assert said == frame.locator(".findings .severity").count()
        assert said or frame.get_by_text("No rule found anything").count()
    else:
        assert figures >= 1, view


def bar_colours(frame: Frame) -> list[str]:
    """Of the timeline's phases, one each, as they are painted."""
    script = "all => all.map(bars => getComputedStyle(bars.querySelector('.point path')).fill)"
    return list(frame.eval_on_selector_all(".plot .barlayer .trace.bars:has(.point path)", script))


def test_html_page(browser: Browser, board: Board, name: str, tmp_path: Path) -> None:
    assert main(["report", str(board.trace(name)), "--html", str(tmp_path / "report.html")]) == 0
    context = browser.new_context(
        viewport={"width": 1400, "height": 1000}, color_scheme="light", offline=True
    )
    page, watch = context.new_page(), Watch()
    watch.attach(page)
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    assert page.locator("figure").count() >= 3
    stages = read_summary(board.trace(name)).stages
    assert [text.lower() for text in page.locator("h2.part").all_inner_texts()][: len(stages)] == list(stages)
    for theme in THEMES:
        page.emulate_media(color_scheme=theme)
        # Not by wait_for_function, which the page's own policy forbids.
        wait_until(lambda now=theme: page.evaluate("document.documentElement.dataset.theme") == now, theme)
        assert undrawn_plots(page.main_frame) == []
        keep_screenshot(page, f"matrix_{name}_html_{theme}", page.screenshot(full_page=True))
    context.close()
    assert (watch.errors, watch.outside) == ([], [])


# -- readers without a page ----------------------------------------------------------------------------


def test_holistic_trace_analysis(board: Board, name: str, held: Held, tmp_path: Path) -> None:
    """It reads the file, and finds every kernel."""
    if not held.on_gpu:
        pytest.skip("HolisticTraceAnalysis is about GPUs: it refuses a trace without kernels")
    from hta.trace_analysis import TraceAnalysis

    text = gzip.decompress(board.trace(name).read_bytes())
    if b'"distributedInfo"' not in text:  # it asks for a rank, which a single process does not write
        text = text.replace(b'"schemaVersion"', b'"distributedInfo": {"rank": 0}, "schemaVersion"', 1)
    (tmp_path / "trace.json.gz").write_bytes(gzip.compress(text))
    analysis = TraceAnalysis(trace_dir=str(tmp_path))
    assert analysis.get_temporal_breakdown(visualize=False)["kernel_time(us)"].iloc[0] > 0
    table = analysis.t.get_trace(0)
    symbols = analysis.t.symbol_table.get_sym_table()
    kernels = table[table["cat"].map(lambda cat: symbols[cat] == "kernel")]
    assert len(kernels) == sum(held.kernels.values())


def test_native_perfetto_export(board: Board, name: str, held: Held, tmp_path: Path) -> None:
    target = tmp_path / "a.pftrace"
    assert main(["export", str(board.trace(name)), "--to", "perfetto", "--out", str(target)]) == 0
    trace = Trace()
    trace.ParseFromString(target.read_bytes())
    described = [p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")]
    assert missing({d.name for d in described if d.HasField("counter")}) == set()
    named: dict[int, TrackDescriptor] = {d.uuid: d for d in described}
    used = {p.track_event.track_uuid for p in trace.packet if p.HasField("track_event")}
    assert used <= set(named) and len(used) >= len(PROMISED) + 1
