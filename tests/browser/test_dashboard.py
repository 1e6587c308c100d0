"""Tests of the MoE tab in a real Chromium that can only reach this machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Frame, Page, Route

from paths import DATA
from tiny_ranks import LAYERS, Run, sent, write_ranks

from .harness import SCREENSHOTS, Internet, offline_context, tensorboard, wait_until
from .moe_tab import (
    VIEWS,
    Watch,
    accessibility_problems,
    address,
    open_view,
    plugin_frame,
    shown_numbers,
    shown_tables,
    switch_view,
    undrawn_plots,
    wait_ready,
)
from .test_tensorboard import profile_demo_model

pytestmark = pytest.mark.browser

H200 = DATA / "h200"
TRAIN, PREFILL = "train_grouped_mm.pt.trace.json.gz", "prefill_grouped_mm.pt.trace.json.gz"
EAGER = "prefill_eager.pt.trace.json.gz"
HOSTILE = "<img src=x onerror=alert(1)>"
SHOT_WIDTHS = (1400, 900)


@dataclass(frozen=True)
class Board:
    url: str
    logdir: Path
    demo: str
    """File name of the demo run's trace."""
    rank_1: str
    """That of the second rank's trace."""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    logdir = tmp_path_factory.mktemp("logs")
    profile_demo_model(logdir / "demo")
    record_two_ranks(logdir / "two_ranks", tmp_path_factory.mktemp("store") / "store")
    write_ranks(logdir / "four_ranks", Run(ranks=4))
    for run, name in (
        ("h200_train", TRAIN),
        ("h200_prefill", PREFILL),
        ("h200_eager", EAGER),
        (HOSTILE, TRAIN),
    ):
        (logdir / run).mkdir()
        shutil.copy(H200 / name, logdir / run)
    broken = logdir / "broken"
    broken.mkdir()
    (broken / f"{HOSTILE}.pt.trace.json").write_text("{")
    (broken / "foreign.pt.trace.json").write_text('{"traceEvents": []}')
    (broken / "half.pt.trace.json.gz").write_bytes((H200 / TRAIN).read_bytes()[:100_000])
    demo, rank_1 = (
        next(f.name for f in (logdir / run).glob(pattern))
        for run, pattern in (("demo", "*.pt.trace.json*"), ("two_ranks", "rank1*.pt.trace.json*"))
    )
    with tensorboard(logdir, tmp_path_factory.mktemp("scratch")) as url:
        yield Board(url, logdir, demo, rank_1)


def record_two_ranks(folder: Path, store: Path) -> None:
    script = Path(__file__).parent / "two_ranks.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), folder, store], stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.fixture
def watch(page: Page) -> Iterator[Watch]:
    """The page of the test; afterwards nothing may have been wrong with it."""
    found = Watch()
    found.attach(page)
    yield found
    assert found.errors == []
    assert found.outside == [], "the tab asked the internet for something"


def runs_of(board: Board) -> dict[str, dict[str, str]]:
    return {
        "demo": {"run": "demo", "trace": board.demo, "run_b": "two_ranks", "trace_b": board.rank_1},
        "h200": {"run": "h200_train", "trace": TRAIN},
        "two_ranks": {"run": "two_ranks"},
        "four_ranks": {"run": "four_ranks", "trace": "rank0.pt.trace.json"},
    }


# -- every view draws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["demo", "h200", "two_ranks", "four_ranks"])
def test_every_view_draws_without_the_internet(page: Page, watch: Watch, board: Board, run: str) -> None:
    """Of one run each view by its address; of the others by the buttons, but for that of ranks."""
    frame = open_view(page, board.url, VIEWS[0], **runs_of(board)[run])
    for view in VIEWS:
        if run == "h200" or view == "ranks":
            frame = open_view(page, board.url, view, **runs_of(board)[run])
        elif view != VIEWS[0]:
            switch_view(frame, view)
        assert undrawn_plots(frame) == [], view
        assert frame.locator(".problem").count() == 0, view
        figures = frame.locator("figure").count()
        assert figures >= {"overview": 0, "ranks": 3 if run == "two_ranks" else 0}.get(view, 1), view
        assert frame.locator(".panel, figure, .state").count() > 0


def test_ranks_are_told_apart(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "ranks", run="two_ranks")
    rows = shown_tables(frame)["rank-load"]
    assert [row["rank"] for row in rows] == ["rank 0", "rank 1"]
    assert rows[1]["tokens"] == 2 * rows[0]["tokens"]
    assert "each rank routes tokens of its own" in frame.locator("main").inner_text()
    assert "Not shown" in frame.locator("main").inner_text(), "the all-to-all is not invented"


def test_ranks_together_show_who_sends_and_who_waits(page: Page, watch: Watch, board: Board) -> None:
    run = Run(ranks=4)
    frame = open_view(page, board.url, "ranks", run="four_ranks")
    assert undrawn_plots(frame) == []
    for figure in frame.locator("details").all():
        figure.evaluate("details => { details.open = true; }")
    tables = shown_tables(frame)
    for rank, row in enumerate(tables["rank-sent"]):
        for to in range(4):
            slots = (sent(run, rank, to, layer, call) for layer in range(LAYERS) for call in range(run.calls))
            assert row[f"to rank {to}"] == sum(slots)
    (one,) = (
        r
        for r in tables["rank-exchange"]
        if (r["layer"], r["part"], r["rank"]) == ("L01", "combine", "rank 1")
    )
    assert (one["calls"], one["wait µs"]) == (3, 60)
    assert [row["waited for"] for row in tables["rank-share"]] == ["rank 3", "rank 3"]
    words = frame.locator("main").inner_text()
    assert "rank 1 +250.000 µs" in words and "96 of 96 comparisons" in words


def test_broken_traces_are_listed_with_their_reason(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "overview")
    frame.locator(".picker[data-checked]").wait_for()
    frame.locator(".broken summary").click()
    words = frame.locator(".broken").inner_text()
    assert "3 files cannot be read" in words
    for reason in ("without moe_trace data", "truncated", f"{HOSTILE}.pt.trace.json"):
        assert reason in words
    frame = open_view(page, board.url, "overview", run="broken", trace="half.pt.trace.json.gz")
    assert "This trace cannot be read." in frame.locator("main").inner_text()


def test_names_are_text_never_html(page: Page, watch: Watch, board: Board) -> None:
    for view in VIEWS:
        frame = open_view(page, board.url, view, run=HOSTILE, trace=TRAIN)
        assert frame.locator("img").count() == 0
    frame = open_view(page, board.url, "overview", run=HOSTILE, trace=TRAIN)
    assert frame.locator("h2", has_text=HOSTILE).count() == 1


def test_a_folder_that_became_empty_says_what_to_do(
    browser: Browser, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """TensorBoard itself hides the tab of a folder that is empty from the start."""
    shutil.copy(H200 / TRAIN, tmp_path)
    with (
        tensorboard(tmp_path, tmp_path_factory.mktemp("scratch")) as url,
        offline_context(browser, Internet()) as context,
    ):
        page = context.new_page()
        frame = open_view(page, url, "overview")
        (tmp_path / TRAIN).unlink()
        reload_data(page)
        frame.locator(".state").wait_for()
        words = frame.locator("main").inner_text()
        assert "No trace was found" in words
        assert "moe-trace run" in words


def reload_data(page: Page) -> None:
    """TensorBoard's own button."""
    page.locator("app-header-reload button").click()


# -- numbers -------------------------------------------------------------------------------------------


def report(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "moe_trace", "report", str(path), "--format", "json"]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def at(plain: Any, path: str) -> Any:
    for part in path.split("."):
        plain = plain[int(part)] if isinstance(plain, list) else plain[part]
    return plain


def number_of(text: str) -> float:
    """What a reader takes the text for, in the number's own unit."""
    match = re.match(r"([+-]?[\d,.]+(?:e[+-]?\d+)?)\s*(%|[PTGMk](?=FLOP))?", text)
    assert match, text
    scale = {"%": 0.01, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, None: 1.0}[match[2]]
    return float(match[1].replace(",", "")) * scale


@pytest.mark.parametrize("run", ["demo", "h200"])
def test_numbers_equal_the_report(page: Page, watch: Watch, board: Board, run: str) -> None:
    where = runs_of(board)[run]
    plain = report(board.logdir / where["run"] / where["trace"])
    frame = open_view(page, board.url, "overview", **where)
    numbers = shown_numbers(frame)
    assert len(numbers) >= 10
    for one in numbers:
        assert one["value"] == at(plain, one["path"]), one
        assert number_of(one["text"]) == pytest.approx(one["value"], rel=6e-3), one
    sentences = frame.locator(".findings .sentence").all_inner_texts()
    assert sorted(sentences) == sorted(f["sentence"].replace("`", "") for f in plain["findings"])
    cards = {c.get_attribute("data-card"): c for c in frame.locator(".card").all()}
    dead = cards["dead experts"].locator("[data-value]").get_attribute("data-value")
    assert int(dead or -1) == sum(len(r["load"]["dead_experts"]) for r in plain["routers"])
    confidences = [r["router"]["confidence_mean"] for r in plain["routers"]]
    shown = cards["router confidence"].locator("[data-value]").get_attribute("data-value")
    assert float(shown or "nan") == pytest.approx(sum(confidences) / len(confidences))
    check_routing(page, board, where, plain)
    check_time(page, board, where, plain)


def check_routing(page: Page, board: Board, where: dict[str, str], plain: dict[str, Any]) -> None:
    site = plain["routers"][-1]["site"]
    frame = open_view(page, board.url, "routing", site=site, **where)
    for one in shown_numbers(frame):
        assert one["value"] == at(plain, one["path"]), one
    tables = shown_tables(frame)
    for row, router in zip(tables["experts"], plain["routers"], strict=True):
        assert (row["layer"], row["tokens"]) == (router["site"], router["tokens"])
        for heading, key in (
            ("max÷mean", "max_over_mean"),
            ("CV", "cv"),
            ("Gini", "gini"),
            ("entropy", "entropy"),
        ):
            assert row[heading] == router["load"][key]
        assert row["dead experts"] == len(router["load"]["dead_experts"])
    last = plain["routers"][-1]
    assert {row["expert"]: row["assignments"] for row in tables["sorted"]} == {
        float(i): n for i, n in enumerate(last["assignments"])
    } or {int(float(row["expert"])): row["assignments"] for row in tables["sorted"]} == dict(
        enumerate(last["assignments"])
    )
    histogram = last["router"]["k_histogram"]
    assert ("k" in tables) == (sum(map(bool, histogram)) > 1), "shown where tokens used different numbers"
    if "k" in tables:
        assert [tables["k"][0][f"{k} experts"] for k in range(len(histogram))] == histogram


def check_time(page: Page, board: Board, where: dict[str, str], plain: dict[str, Any]) -> None:
    tables = shown_tables(open_view(page, board.url, "time", **where))
    clocks = {"device": "device_busy_us", "host": "host_us"}
    seen = 0
    for key, rows in tables.items():
        part, _, clock = key.partition("-")
        if clock not in clocks:
            continue
        seen += 1
        number = {"forward": "calls", "backward": "backwards"}[part]
        for row, layer in zip(rows, plain["phases"]["layers"], strict=True):
            times = layer[part]
            for heading in (h for h in row if h.removesuffix(" µs") in times):
                expected = times[heading.removesuffix(" µs")][clocks[clock]] / layer[number]
                assert row[heading] == pytest.approx(expected), (key, heading)
    assert seen == (4 if plain["phases"]["whole"]["on_device"] else 1)
    for row, router in zip(tables["latency"], plain["routers"], strict=True):
        for clock in ("host", "device_span", "device_busy"):
            figures = router["latency_us"][clock]
            if figures is not None:
                assert row[f"{clock.replace('_', ' ')} p50 µs"] == figures["p50"]
                assert row[f"{clock.replace('_', ' ')} p95 µs"] == figures["p95"]


def test_compare_equals_the_diff_command(page: Page, watch: Watch, board: Board) -> None:
    paths = [str(board.logdir / "h200_eager" / EAGER), str(board.logdir / "h200_prefill" / PREFILL)]
    command = [sys.executable, "-m", "moe_trace", "diff", *paths, "--format", "json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    frame = open_view(
        page, board.url, "compare", run="h200_eager", trace=EAGER, run_b="h200_prefill", trace_b=PREFILL
    )
    tables = shown_tables(frame)
    rows = {row["metric"]: row for row in tables["changes"]}
    expected = [c for c in told["changes"] if c["site"] == "all"]
    assert expected and set(rows) == {c["metric"] for c in expected}
    for change in expected:
        row = rows[change["metric"]]
        assert (row["A"], row["B"], row["verdict"]) == (change["a"], change["b"], change["verdict"])
        assert row["B − A"] == change["difference"]
    setup = [(row["what differs"], row["A"], row["B"]) for row in tables["setup"]]
    assert setup == [(s["fact"], s["a"], s["b"]) for s in told["setup"]]
    assert ("experts implementation", "eager", "grouped_mm") in setup
    routing = {row["layer"]: row["verdict"] == "changed" for row in tables["routing-changes"]}
    assert routing == {r["site"]: r["changed"] for r in told["routing"]}


def test_compare_says_where_no_stage_is_shared(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(
        page, board.url, "compare", run="h200_train", trace=TRAIN, run_b="h200_prefill", trace_b=PREFILL
    )
    assert "share no stage" in frame.locator("[data-figure=setup]").inner_text()
    assert frame.locator(".sides [data-stage]").all_inner_texts() == ["Stage\ntrain", "Stage\nprefill"]
    assert frame.locator("[data-figure=changes]").count() == 0, "no empty table"


# -- theme, address, reload ----------------------------------------------------------------------------


def test_theme_follows_tensorboard(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "time", **runs_of(board)["h200"])
    before = frame.evaluate("() => document.documentElement.dataset.theme")
    page.locator("app-header-dark-mode-toggle button").click()
    dark = page.get_by_role("menuitemradio", name="Dark")
    (dark if dark.count() else page.get_by_role("menuitem", name="Dark")).click()
    frame.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    assert before == "light"
    ink = frame.evaluate("() => getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert ink == "rgb(230, 237, 243)", "the charts are drawn in the theme's colours too"


def test_a_link_to_a_view_can_be_shared(page: Page, watch: Watch, board: Board, browser: Browser) -> None:
    frame = open_view(page, board.url, "overview", **runs_of(board)["demo"])
    frame.get_by_role("button", name="Routing", exact=True).click()
    wait_ready(frame, after=1)
    frame.get_by_label("Layer", exact=True).select_option("L03")
    frame.locator(".detail[data-site=L03]").wait_for()
    frame.get_by_label("Step", exact=True).fill("1")
    frame.locator("#routing-map[data-steps='1-1']").wait_for()
    shared = page.url
    where = runs_of(board)["demo"]
    b_side = {"run_b": where["run_b"], "trace_b": where["trace_b"]}
    chosen = {"run": "demo", "trace": board.demo, "from": 1, "to": 1, "site": "L03", **b_side}
    assert shared == address(board.url, "routing", **chosen)
    with offline_context(browser, Internet()) as other:
        second = other.new_page()
        second.goto(shared)
        there = plugin_frame(second)
        there.locator("#routing-map[data-steps='1-1']").wait_for()
        there.locator(".detail[data-site=L03]").wait_for()
    page.go_back()
    wait_until(lambda: "view=overview" in page.url, "the address of the first view")
    frame.locator(".view.overview .card").first.wait_for()


def test_the_address_of_other_tabs_is_left_alone(page: Page, watch: Watch, board: Board) -> None:
    open_view(page, board.url, "time", **runs_of(board)["demo"])
    page.get_by_role("tab", name="Scalars").click()
    wait_until(lambda: "#scalars" in page.url, "TensorBoard to show its scalars")
    page.get_by_role("tab", name="MoE").click()
    wait_until(lambda: "#moe" in page.url, "TensorBoard to show the MoE tab")
    assert "p.moe.view=time" in page.url


def test_reload_shows_a_new_run_and_keeps_what_is_open(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "time", **runs_of(board)["h200"])
    frame.locator("figure summary").first.click()
    reload_data(page)
    page.wait_for_timeout(1500)
    assert frame.locator("figure details").first.get_attribute("open") is not None, "no file changed"
    later = board.logdir / "later"
    later.mkdir()
    try:
        shutil.copy(H200 / PREFILL, later)
        reload_data(page)
        frame.locator("select option[value=later]").wait_for(state="attached")
    finally:
        shutil.rmtree(later)


# -- questions in flight -------------------------------------------------------------------------------


def test_a_late_answer_never_overwrites_a_newer_question(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "routing", **runs_of(board)["demo"])
    held: list[Route] = []

    def hold_first(route: Route) -> None:
        if not held:
            held.append(route)
        else:
            route.continue_()

    page.route("**/plugin/moe/heat?*from=0*", hold_first)
    slider = frame.get_by_label("Step", exact=True)
    slider.fill("1")
    frame.locator("#routing-map[data-steps='1-1']").wait_for()
    slider.fill("0")
    wait_until(lambda: page.title() and held, "the question about step 0")  # a call lets events in
    slider.fill("2")
    frame.locator("#routing-map[data-steps='2-2']").wait_for()
    held[0].continue_()
    page.wait_for_timeout(500)
    assert frame.locator("#routing-map").get_attribute("data-steps") == "2-2"


def test_a_failure_says_so_and_can_be_tried_again(page: Page, board: Board) -> None:
    frame = open_view(page, board.url, "overview", **runs_of(board)["demo"])
    page.route("**/plugin/moe/time?*", lambda route: route.abort())
    frame.get_by_role("button", name="Time", exact=True).click()
    frame.locator(".problem").wait_for()
    assert "TensorBoard does not answer" in frame.locator(".problem").inner_text()
    page.unroute("**/plugin/moe/time?*")
    frame.get_by_role("button", name="Try again").click()
    frame.locator("figure").first.wait_for()


def test_a_slow_view_says_that_it_is_loading(page: Page, watch: Watch, board: Board) -> None:
    held: list[Route] = []
    frame = open_view(page, board.url, "overview", **runs_of(board)["demo"])
    page.route("**/plugin/moe/time?*", lambda route: held.append(route))
    frame.get_by_role("button", name="Time", exact=True).click()
    frame.locator(".loading").wait_for()
    wait_until(lambda: page.title() and held, "the question")
    held[0].continue_()
    frame.locator("figure").first.wait_for()
    assert frame.locator(".loading").count() == 0


def test_without_plotly_the_tables_say_it(page: Page, board: Board) -> None:
    page.route("**/plotly.min.js", lambda route: route.fulfill(status=404, body="{}"))
    frame = open_view(page, board.url, "time", **runs_of(board)["demo"])
    assert "pip install" in frame.locator("figure .plot").first.inner_text()
    assert shown_tables(frame)["latency"]


# -- mouse and keyboard --------------------------------------------------------------------------------


def test_a_click_on_a_cell_opens_its_layer(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "routing", **runs_of(board)["demo"])
    box = frame.locator("#routing-map .plot .nsewdrag").first.bounding_box()
    assert box is not None
    # The demo model has 4 layers of 16 experts: the middle of row 3, column 5.
    page.mouse.click(box["x"] + box["width"] * 5.5 / 16, box["y"] + box["height"] * 3.5 / 4)
    frame.locator(".detail[data-site=L03] .expert").wait_for()
    assert frame.locator(".expert").inner_text().startswith("Expert 5:")
    assert "p.moe.site=L03" in page.url
    assert "p.moe.expert=5" in page.url


# A step is shown for a quarter of a second, which somebody who looks now and then may miss.
NOTE_STEPS = """body => {
  window.shown = [];
  new MutationObserver(() => {
    const steps = document.getElementById("routing-map")?.dataset.steps;
    if (steps && window.shown.at(-1) !== steps) window.shown.push(steps);
  }).observe(body, {subtree: true, childList: true, attributes: true, attributeFilter: ["data-steps"]});
}"""


def test_play_walks_through_the_steps(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "routing", **runs_of(board)["demo"])
    body = frame.locator("body")
    body.evaluate(NOTE_STEPS)
    frame.get_by_role("button", name="Play").press("Space")
    frame.locator("#routing-map[data-steps='2-2']").wait_for()
    assert body.evaluate("() => window.shown") == ["0-0", "1-1", "2-2"]
    frame.get_by_role("button", name="Play").wait_for()  # it is Pause while it plays
    frame.get_by_label("Steps at a time").fill("2")
    frame.get_by_label("Steps at a time").press("Enter")
    frame.locator("#routing-map[data-steps='1-2']").wait_for()
    frame.get_by_role("button", name="All steps").press("Enter")
    frame.locator("#routing-map[data-steps='0-2']").wait_for()


def test_timeline_pans_and_zooms(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "timeline", **runs_of(board)["h200"])
    whole = kernel_count(frame)
    frame.get_by_role("button", name="Zoom in").press("Enter")
    frame.locator("figure[data-range]").wait_for()
    first = frame.locator("figure").get_attribute("data-range")
    assert kernel_count(frame) < whole
    frame.get_by_role("button", name="Later").press("Enter")
    frame.wait_for_function(f"() => document.querySelector('figure').dataset.range !== '{first}'")
    second = frame.locator("figure").get_attribute("data-range")
    box = frame.locator(".plot .nsewdrag").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 200, y, steps=5)
    page.mouse.up()
    frame.wait_for_function(f"() => document.querySelector('figure').dataset.range !== '{second}'")
    start = float((frame.locator("figure").get_attribute("data-range") or "").split()[0])
    assert start < float((second or "").split()[0]), "dragged to the right, so earlier work is seen"
    assert f"p.moe.start={start:.3f}" in page.url
    frame.get_by_role("button", name="Whole step").press("Enter")
    frame.wait_for_function("() => document.querySelector('.kernels').dataset.range.startsWith('0.000')")
    assert kernel_count(frame) == whole


def kernel_count(frame: Frame) -> int:
    frame.wait_for_function(
        "() => { const f = document.querySelector('figure').dataset.range;"
        " const k = document.querySelector('.kernels').dataset.range; return k && (!f || f === k); }"
    )
    words = frame.locator(".kernels [role=status]").inner_text()
    return int(words.split()[0].replace(",", ""))


def test_download_gives_the_file(page: Page, watch: Watch, board: Board) -> None:
    frame = open_view(page, board.url, "timeline", **runs_of(board)["h200"])
    with page.expect_download() as download:
        frame.get_by_role("link", name="Download the trace").click()
    assert Path(download.value.path()).read_bytes() == (H200 / TRAIN).read_bytes()
    assert "Perfetto" in frame.locator(".download").inner_text()


def test_definitions_are_one_hover_away_and_on_the_keyboard(page: Page, watch: Watch, board: Board) -> None:
    for view in VIEWS[:5]:
        frame = open_view(page, board.url, view, **runs_of(board)["h200"])
        frame.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
        terms = frame.locator(".term:visible")
        assert terms.count() >= 2, view
        for way in ("hover", "focus"):
            getattr(terms.first, way)()
            tip = frame.locator(f"#{terms.first.get_attribute('aria-describedby')}")
            tip.wait_for(state="visible")
            assert len(tip.inner_text()) > 20
            page.mouse.move(5, 400)


@pytest.mark.parametrize("view", VIEWS)
def test_the_keyboard_reaches_everything(page: Page, watch: Watch, board: Board, view: str) -> None:
    frame = open_view(page, board.url, view, **runs_of(board)["two_ranks"])
    frame.locator(".picker[data-checked]").wait_for()
    # What can be operated, numbered; whatever has a click has to be among it.
    count = frame.evaluate(
        """() => {
          const stops = 'button, a[href], select, input, summary, [tabindex="0"]';
          const can = [...document.querySelectorAll(stops)]
            .filter(e => e.getClientRects().length && !e.closest('details:not([open]) > :not(summary)'));
          can.forEach((e, i) => { e.dataset.stop = i; });
          document.activeElement?.blur();
          document.body.tabIndex = -1;
          document.body.focus();
          return can.length;
        }"""
    )
    seen, outlined = set(), True
    for _ in range(count + 5):
        page.keyboard.press("Tab")
        stop = frame.evaluate("() => document.activeElement?.dataset?.stop")
        if stop is not None:
            seen.add(int(stop))
            style = frame.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            outlined &= style != "none"
    assert seen == set(range(count))
    assert outlined, "the focus can be seen"


# -- looks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_and_screenshots_are_kept(
    browser: Browser, internet: Internet, board: Board, theme: str
) -> None:
    watch = Watch()
    with offline_context(browser, internet) as context:
        page = context.new_page()
        watch.attach(page)
        page.goto(board.url)
        page.evaluate(f"localStorage.setItem('_tb_global_settings', JSON.stringify({{theme: '{theme}'}}))")
        for width in SHOT_WIDTHS:
            for view in VIEWS:
                page.set_viewport_size({"width": width, "height": 1000})
                if view in (VIEWS[0], "ranks"):
                    run = runs_of(board)["four_ranks" if view == "ranks" else "h200"]
                    frame = open_view(page, board.url, view, **run)
                else:
                    switch_view(frame, view)
                assert frame.evaluate("() => document.documentElement.dataset.theme") == theme
                assert accessibility_problems(frame) == [], f"{view} at {width} in {theme}"
                wide = frame.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
                assert wide <= 0, f"{view} at {width} scrolls sideways"
                keep_whole_page(page, frame, f"moe_{view}_{theme}_{width}", width)
    assert watch.errors == []


def keep_whole_page(page: Page, frame: Frame, name: str, width: int) -> None:
    height = int(frame.evaluate("() => document.documentElement.scrollHeight")) + 70
    page.set_viewport_size({"width": width, "height": min(4000, height)})
    page.wait_for_timeout(300)
    SCREENSHOTS.mkdir(exist_ok=True)
    # Not through playwright's `path=`: that starts a thread which stays as long as the browser.
    (SCREENSHOTS / f"{name}.png").write_bytes(page.screenshot())
