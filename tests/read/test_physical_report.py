"""Tests of physical experts in reports, against brute-force sums: four experts on six slots of two ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moe_trace
from moe_trace.cli import main
from moe_trace.data.schema import RoutingSample
from moe_trace.read.analysis import TraceSummary, analyse
from moe_trace.show.figures.report import figures
from moe_trace.show.text.report import render_text
from tiny_ranks import Run, write_ranks
from tiny_trace import write_tiny

RANKS, SLOTS, CALLS = 2, 6, 4
MAPS = ([0, 1, 2, 3, 0, 1], [0, 2, 2, 2, 1, 3])
"""The balancer moves experts between the second and the third call."""
COUNTS = ([5, 2, 1, 3, 4, 1], [3, 3, 1, 1, 2, 6], [7, 2, 2, 1, 0, 4], [6, 1, 3, 1, 3, 2])
"""By call, of each slot; a layer and rank further each is turned by one."""


def map_of(call: int) -> list[int]:
    return MAPS[call // 2]


def slots_of(rank: int, layer: int, call: int, *, shared: bool) -> list[int]:
    turn = layer + (0 if shared else rank)
    return COUNTS[call][turn:] + COUNTS[call][:turn]


def run(exchange: str) -> Run:
    shared = exchange == "all_reduce"

    def balanced(rank: int, made: RoutingSample) -> RoutingSample:
        counts = np.array(slots_of(rank, made.layer, made.call, shared=shared))
        held = np.array(map_of(made.call))
        assignments = np.bincount(held, counts, 4).astype(np.int64)
        return replace(made, assignments=assignments, slot_assignments=counts, slot_experts=held)

    return Run(
        ranks=RANKS,
        calls=CALLS,
        counts=lambda rank, layer, call: (4, 4, 4, 4),
        exchange=exchange,
        with_collectives=False,
        change_sample=balanced,
        slots=SLOTS,
    )


def summary_of(folder: Path, exchange: str) -> TraceSummary:
    return analyse(write_ranks(folder, run(exchange)), label="run")


@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
def test_loads_of_slots_ranks_and_replicas_are_the_sums_of_the_calls(tmp_path: Path, exchange: str) -> None:
    summary = summary_of(tmp_path, exchange)
    assert summary.physical is not None
    tellers = range(1 if exchange == "all_reduce" else RANKS)
    for number, layer in enumerate(summary.physical.layers):
        calls = [
            (map_of(call), slots_of(rank, number, call, shared=exchange == "all_reduce"))
            for call in range(CALLS)
            for rank in tellers
        ]
        slots = [sum(counts[slot] for _, counts in calls) for slot in range(SLOTS)]
        assert list(layer.assignments) == slots and layer.maps == 2 and layer.experts == 4
        assert layer.slot_ranks == (0, 0, 0, 1, 1, 1)
        assert layer.rank_assignments == {0: sum(slots[:3]), 1: sum(slots[3:])}
        assert layer.slot_max_over_mean == pytest.approx(max(slots) * SLOTS / sum(slots))
        assert layer.rank_max_over_mean == pytest.approx(
            max(layer.rank_assignments.values()) * RANKS / sum(slots)
        )
        experts = [sum(c[s] for held, c in calls for s in range(SLOTS) if held[s] == e) for e in range(4)]
        assert layer.expert_max_over_mean == pytest.approx(max(experts) * 4 / sum(experts))
        assert list(summary.routers[number].assignments) == experts
        for replica in layer.replicas:
            most = mean = total = 0.0
            for held in MAPS:
                mine = [s for s in range(SLOTS) if held[s] == replica.expert]
                shares = [sum(c[slot] for h, c in calls if h == held) for slot in mine]
                if len(mine) > 1:
                    most, mean = most + max(shares), mean + sum(shares) / len(shares)
                    total += sum(shares)
            assert replica.max_over_mean == pytest.approx(most / mean) and replica.assignments == total
        assert {replica.expert for replica in layer.replicas} == {0, 1, 2}


@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
def test_ranks_compute_what_their_slots_got(tmp_path: Path, exchange: str) -> None:
    report = summary_of(tmp_path, exchange).ranks
    assert report is not None
    shared = exchange == "all_reduce"
    for number, layer in enumerate(report.layers):
        expected = [0, 0]
        for call in range(CALLS):
            for rank in range(1 if shared else RANKS):
                for slot, count in enumerate(slots_of(rank, number, call, shared=shared)):
                    expected[slot // 3] += count
        assert list(layer.load) == expected
        assert layer.hot_rank == int(np.argmax(expected))


def test_text_json_html_and_figure_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summary_of(tmp_path, "all_reduce")
    text = render_text(summary)
    assert "physical expert" in text and "share least evenly" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "physical" in [figure.key for figure in figures(summary)]
    assert main(["report", str(tmp_path), "--format", "json"]) == 0
    layers = json.loads(capsys.readouterr().out)["physical"]["layers"]
    assert layers[0]["slot_experts"] == MAPS[1] and layers[0]["rank_assignments"].keys() == {"0", "1"}
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "--html", str(page)]) == 0
    assert "Load of each physical expert" in page.read_text()


def test_nothing_is_said_where_no_balancer_is_on(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt.trace.json"
    write_tiny(path)
    summary = moe_trace.read_summary(path)
    assert getattr(summary, "physical", None) is None
    assert "slot_assignments" not in path.read_text()
    assert "physical" not in [figure.key for figure in figures(summary)]
