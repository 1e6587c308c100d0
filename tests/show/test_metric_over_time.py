"""Tests of plots of metrics over time, for few and many layers and forwards, against sums by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_trace.read.analysis import TraceSummary, analyse
from moe_trace.show.figures.call_grid import CELLS_MAX, CallGrid, call_grid, grouped_columns
from moe_trace.show.figures.decisions import load_over_time
from moe_trace.show.figures.expert_heat_map import FRAMES_CELLS_MAX, expert_heat_map
from moe_trace.show.figures.metric_over_time import Metric, metric_over_time
from moe_trace.show.figures.report import figures
from paths import DATA
from tiny_trace import write_tiny

METRIC = Metric(key="load", title="Load", unit="max÷mean", caption="How uneven.", worst="highest")


def made(layers: int, steps: int, forwards: int = 1, seed: int = 0) -> CallGrid:
    rng = np.random.default_rng(seed)
    return CallGrid(
        sites=tuple(f"L{i:02d}" for i in range(layers)),
        steps_C=np.repeat(np.arange(steps), forwards),
        nth_C=np.tile(np.arange(forwards), steps),
        values_LC=rng.random((layers, steps * forwards)) + 1,
    )


def test_the_grid_holds_every_call(tmp_path: Path) -> None:
    counts = {0: [(8, 0, 0, 0), (2, 2, 2, 2)], 1: [(4, 4, 0, 0), (5, 1, 1, 1)]}
    path = write_tiny(tmp_path / "a.json", counts=lambda layer, call: counts[layer][call], calls=2)
    calls = summary_of(path).calls
    grid = call_grid(calls, calls.assignments.largest())
    assert grid is not None
    assert grid.values_LC.tolist() == [[8, 2], [4, 5]]
    assert (grid.sites, grid.steps_C.tolist(), grid.nth_C.tolist()) == (("L00", "L01"), [0, 1], [0, 0])


def summary_of(path: Path) -> TraceSummary:
    return analyse([path], label=str(path))


def test_a_layer_that_was_not_called_has_no_value() -> None:
    summary = summary_of(DATA / "h200" / "train_grouped_mm.pt.trace.json.gz")
    calls = summary.calls[1:]
    grid = call_grid(calls, calls.tokens)
    assert grid is not None
    assert np.isnan(grid.values_LC).sum() == 1
    assert call_grid(calls[:0], calls.tokens[:0]) is None


@pytest.mark.parametrize("steps", [999, 1000, 1001])
def test_the_axis_is_even(steps: int) -> None:
    """1000 steps in 400 columns of 3 and of 2 would stretch the end."""
    columns = grouped_columns(made(16, steps))
    first_to_last = [[int(step) for step in label.split(" to ")] for label in columns.labels]
    sizes = [ends[-1] - ends[0] + 1 for ends in first_to_last]
    assert len(set(sizes[:-1])) == 1 and sizes[-1] <= sizes[0] and sum(sizes) == steps


@pytest.mark.parametrize(("layers", "steps", "forwards"), [(16, 1000, 1), (61, 1000, 1), (61, 20, 64)])
def test_groups_keep_the_mean_and_the_size_is_bounded(layers: int, steps: int, forwards: int) -> None:
    grid = made(layers, steps, forwards)
    columns = grouped_columns(grid)
    assert columns.values_LB.size <= CELLS_MAX
    assert len(set(columns.labels)) == len(columns.labels), "a category axis takes equal labels for one"
    assert 3 <= len(columns.ticks) <= 14
    size = -(-steps * forwards // len(columns.labels))
    sizes = [min(size, steps * forwards - start) for start in range(0, steps * forwards, size)]
    means = (columns.values_LB * sizes).sum(1) / (steps * forwards)
    assert means == pytest.approx(grid.means_L())


@pytest.mark.parametrize(
    ("steps", "forwards", "title", "labels"),
    [
        (3, 1, "step", ["0", "1", "2"]),
        (1, 3, "forward of step 0", ["0", "1", "2"]),
        (2, 2, "step", ["0, forward 0", "0, forward 1", "1, forward 0", "1, forward 1"]),
    ],
)
def test_the_axis_counts_steps_where_there_are_several(
    steps: int, forwards: int, title: str, labels: list[str]
) -> None:
    columns = grouped_columns(made(2, steps, forwards))
    assert (columns.title, columns.labels) == (title, labels)


def test_one_layer_far_off_is_named_and_does_not_hide_the_others() -> None:
    grid = made(61, 1000)
    grid.values_LC[7, 500:] = 200.0
    figure = metric_over_time(grid, METRIC)
    heat_map, *others = figure.data
    assert heat_map["type"] == "heatmap" and len(heat_map["z"]) == 61
    assert heat_map["zmax"] < 8 and "what is higher looks the same" in figure.caption
    named = [line["name"] for line in others if "mean" in line["name"]]
    assert len(named) == 3 and named[0].startswith("L07 (highest, mean 101")
    assert max(value for line in others for value in line["y"]) == 200
    assert figure.layout["height"] < 950, "it fits a screen"
    assert len(json.dumps([figure.data, figure.layout])) < 250_000


def test_equal_layers_have_no_worst_one() -> None:
    grid = made(16, 4)
    grid.values_LC[:] = 8.0
    figure = metric_over_time(grid, METRIC)
    assert [spec["name"] for spec in figure.data[1:]] == [
        "all layers",
        "all layers",
        "middle half",
        "middle half",
        "median layer",
    ]
    assert "Every call of every layer has 8." in figure.caption


def test_few_layers_are_lines_and_a_single_forward_is_bars() -> None:
    assert [spec["type"] for spec in metric_over_time(made(4, 9), METRIC).data] == ["scatter"] * 4
    figure = metric_over_time(made(16, 1), METRIC)
    (bars,) = figure.data
    assert (bars["type"], len(bars["x"]), figure.title) == ("bar", 16, "Load of each layer")


def test_the_table_says_the_same() -> None:
    figure = load_over_time(summary_of(DATA / "h100" / "prefill_decode_16_layers.pt.trace.json.gz").calls)
    for row, line in zip(figure.rows, figure.data[0]["z"], strict=True):
        assert row[1:] == pytest.approx((4, min(line), sum(line) / 4, max(line)), rel=1e-3)


def deepseek_size(tmp_path: Path) -> TraceSummary:
    """61 layers of 256 experts over 40 steps: one layer of a trace, again and again."""
    path = write_tiny(
        tmp_path / "a.json",
        calls=40,
        counts=lambda layer, call: tuple(1 + (e + call) % 5 for e in range(256)),
    )
    summary = summary_of(path)
    router, samples = summary.routers[0], [s for s in summary.samples if s.layer == 0]
    sites = {f"layers.{i}": {"layer": i, "site": f"L{i:02d}", "name": f"layers.{i}"} for i in range(61)}
    return replace(
        summary,
        routers=tuple(replace(router, info=replace(router.info, **names)) for names in sites.values()),
        samples=tuple(replace(s, **names) for s in samples for names in sites.values()),
        phases=None,
    )


def test_frames_of_the_heat_map_are_bounded(tmp_path: Path) -> None:
    summary = deepseek_size(tmp_path)
    figure = expert_heat_map(summary)
    assert 2 < len(figure.frames) <= 1 + FRAMES_CELLS_MAX // (61 * 256)
    assert figure.layout["height"] < 800
    size = sum(len(json.dumps([f.data, f.layout, [one.z for one in f.frames]])) for f in figures(summary))
    assert 500_000 < size < 2_500_000
