"""A profiled run of the demo model, as its user sees it in TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page

import moe_trace
from moe_trace.demo import DEMO_PROMPTS, load_demo_model

from .harness import SCREENSHOTS, VIEWPORT, tensorboard
from .scalar_view import open_scalars, shown_tags
from .trace_view import (
    drawn_columns,
    open_trace_view,
    search,
    select_next_hit,
    still_screenshot,
    track_names,
    tracks,
)

pytestmark = pytest.mark.browser

RUN = "demo"
BAND = "MoE routing"
WARMUP_STEPS, ACTIVE_STEPS = 1, 3
COUNTERS = {"load max÷mean", "router entropy (nats)", "active experts", "expert TFLOP/s (with gaps)"}
LANES = ["router", "experts"]
FIGURES = (
    "load_max_over_mean",
    "load_cv",
    "router_entropy",
    "router_confidence",
    "skipped_share",
    "aux_loss",
)


@dataclass(frozen=True)
class Board:
    """A TensorBoard that shows the run, and the labels of the layers that were traced."""

    url: str
    layers: list[str]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    logdir = tmp_path_factory.mktemp("logs")
    layers = profile_demo_model(logdir / RUN)
    with tensorboard(logdir, tmp_path_factory.mktemp("scratch")) as url:
        yield Board(url, layers)


def profile_demo_model(folder: Path) -> list[str]:
    """Writes a trace and scalars of some steps into `folder`; the labels of the model's MoE layers."""
    model, tokenizer = load_demo_model()
    inputs = tokenizer(list(DEMO_PROMPTS.values())[:2], return_tensors="pt", padding=True)
    with (
        moe_trace.profile(
            model,
            activities=[torch.profiler.ProfilerActivity.CPU],
            schedule=torch.profiler.schedule(wait=0, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1),
            on_trace_ready=moe_trace.tensorboard_trace_handler(folder),
        ) as prof,
        torch.inference_mode(),
    ):
        for _ in range(WARMUP_STEPS + ACTIVE_STEPS):
            model(**inputs)
            prof.step()
    return [site.site for site in moe_trace.find_routers(model)]


def keep_screenshot(page: Page, name: str, screenshot: bytes | None = None) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    # Not through playwright's `path=`: that starts a thread which stays as long as the browser.
    (SCREENSHOTS / f"{name}.png").write_bytes(screenshot or still_screenshot(page))


def test_trace_view_shows_the_band_above_all_else(page: Page, board: Board) -> None:
    open_trace_view(page, board.url, RUN)
    keep_screenshot(page, "trace_view")
    names = track_names(page, BAND)
    assert set(names) >= COUNTERS
    assert names[-len(LANES) :] == LANES
    assert tracks(page)[0].process.startswith(BAND)
    undrawn = [name for (process, name), n in drawn_columns(page).items() if BAND in process and n == 0]
    assert undrawn == []
    # It is compact: the operators' rows begin on the first screen, whatever the number of layers.
    assert max(track.bottom for track in tracks(page) if BAND in track.process) < VIEWPORT["height"] / 2


def test_trace_view_finds_the_ranges_of_every_layer(page: Page, board: Board) -> None:
    ranges = [f"moe.{kind}/{layer}" for kind in ("router", "experts", "block") for layer in board.layers]
    open_trace_view(page, board.url, RUN)
    assert {name: search(page, name) for name in ranges} == dict.fromkeys(ranges, ACTIVE_STEPS)
    panel = select_next_hit(page)
    assert f"Title {ranges[-1]}" in panel
    assert "Category user_annotation" in panel


def test_selected_lane_slice_shows_the_figures(page: Page, board: Board) -> None:
    open_trace_view(page, board.url, RUN)
    layer = board.layers[0]
    panels = [select_next_hit(page) for _ in range(search(page, layer))]
    keep_screenshot(page, "lane_selected")
    lanes = [panel for panel in panels if "Category moe_trace" in panel]
    assert lanes and all(f"Title {layer}" in lane and "tokens" in lane for lane in lanes)
    experts = next(lane for lane in lanes if "expert FLOPs" in lane)
    router = next(lane for lane in lanes if lane is not experts)
    assert "router entropy (nats)" in router and "router FLOPs" in router
    assert "assignments" in experts and "load max÷mean" in experts and "busiest experts" in experts


def test_scalar_dashboard_shows_every_layer_and_the_mean(page: Page, board: Board) -> None:
    expected = {f"moe_{figure}/{name}" for figure in FIGURES for name in [*board.layers, "mean"]}
    open_scalars(page, board.url, RUN, expected)
    assert shown_tags(page) == expected
    page.locator("tf-scalar-card").first.scroll_into_view_if_needed()
    keep_screenshot(page, "scalars")
