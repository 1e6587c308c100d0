"""Tests of `compare`: the set-up first, then the routing against chance, then time on one clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_trace.data.calls.placements import Places
from moe_trace.data.calls.ragged import CountLists
from moe_trace.data.calls.table import CallTable, RouterKey
from moe_trace.data.display.csv import csv_text
from moe_trace.read.diff import compare
from moe_trace.read.diff.comparison import Change, _change, _host_apart
from moe_trace.read.diff.metrics import Side, draw
from moe_trace.read.diff.resampling import Estimate
from moe_trace.read.diff.routing import compare_routing
from moe_trace.read.reader import TraceSummary, read_summary
from moe_trace.show.diff import headline, render_diff_csv, render_diff_text
from paths import DATA
from spliced import recording_in
from tiny_trace import write_tiny

H200 = DATA / "h200"
Edit = Callable[[dict[str, Any]], None]


def summary_of(path: Path, edit: Edit | None = None, **arguments: Any) -> TraceSummary:
    write_tiny(path, **arguments)
    if edit is not None:
        trace = json.loads(path.read_text())
        edit(recording_in(trace))
        path.write_text(json.dumps(trace))
    return read_summary(path)


# -- the set-up ---------------------------------------------------------------------------------------


def test_another_implementation_is_the_first_thing_said() -> None:
    a, b = (read_summary(H200 / f"prefill_{how}.pt.trace.json.gz") for how in ("eager", "grouped_mm"))
    found = compare(a, b)
    assert [(c.fact, c.a, c.b) for c in found.setup] == [
        ("experts implementation", "eager", "grouped_mm"),
    ] or found.setup[0].fact == "experts implementation"
    text = render_diff_text(found)
    assert text.index("experts implementation") < text.index("Routing") < text.index("Metrics")
    assert max(len(line) for line in text.splitlines()[2:]) <= 80


@pytest.mark.parametrize(
    ("where", "key", "value", "fact"),
    [
        ("model", "dtype", "float16", "dtype"),
        ("model", "name", "another", "model"),
        ("model", "experts_implementation", "eager", "experts implementation"),
        ("versions", "torch", "9.9", "version of torch"),
        ("options", "every", 7, "tracer's every"),
    ],
)
def test_each_fact_of_the_set_up(tmp_path: Path, where: str, key: str, value: object, fact: str) -> None:
    def edit(payload: dict[str, Any]) -> None:
        payload[where][key] = value

    found = compare(summary_of(tmp_path / "a.json"), summary_of(tmp_path / "b.json", edit))
    assert fact in {c.fact for c in found.setup} and not found.unchanged
    assert fact in headline(found)


def test_the_same_file_is_unchanged(tmp_path: Path) -> None:
    a = summary_of(tmp_path / "a.json", calls=8)
    found = compare(a, a)
    assert found.unchanged and not found.setup and all(r.same_counts for r in found.routing)
    assert headline(found).startswith("Unchanged")


def test_another_clock_is_not_compared() -> None:
    a = read_summary(H200 / "prefill_eager.pt.trace.json.gz")
    assert a.times is not None
    stages = {stage: replace(s, times=_on_host(s)) for stage, s in a.stages.items()}
    b = replace(a, times=_on_host(a), stages=stages)
    found = compare(a, b)
    assert "host time" in found.notes[0]
    assert not {c.metric for c in found.changes} & {"experts_p50", "host_p50", "experts_share"}
    assert {c.metric for c in found.changes} >= {"load_cv", "router_entropy"}


def _on_host(summary: TraceSummary) -> Any:
    assert summary.times is not None
    return replace(summary.times, on_device=False)


# -- routing ------------------------------------------------------------------------------------------


class _Calls:
    def __init__(self, shares: np.ndarray, rng: np.random.Generator, units: int, slots: int) -> None:
        self.counts = rng.multinomial(slots, shares, units)


def _side(calls: dict[str, _Calls]) -> Side:
    units = max(len(own.counts) for own in calls.values())
    unit = np.concatenate([np.arange(len(own.counts)) for own in calls.values()])
    router = np.repeat(np.arange(len(calls)), [len(own.counts) for own in calls.values()])
    counts = CountLists.of([row for own in calls.values() for row in own.counts])
    keys = tuple(RouterKey(name, name, layer) for layer, name in enumerate(calls))
    table = CallTable(keys, router, {}, {"assignments": counts}, Places.of((), len(router)))
    return Side(table, unit, units, draw(units), {}, frozenset())


def _routing(seed: int, *, moved: float = 0.0, units: int = 8, slots: int = 400) -> Any:
    rng = np.random.default_rng(seed)
    even = np.full(16, 1 / 16)
    other = even + moved * np.where(np.arange(16) < 8, 1, -1) / 16
    layers = [f"l{i}" for i in range(6)]
    a = _side({n: _Calls(even, rng, units, slots) for n in layers})
    b = _side({n: _Calls(other if n == "l3" else even, rng, units, slots) for n in layers})
    return compare_routing(a, b, [(n, n, n) for n in layers], "prefill")


def test_the_moved_layer_is_named_and_only_it() -> None:
    found = _routing(0, moved=0.2)
    assert [r.site for r in found if r.changed] == ["l3"]
    l3 = found[3]
    assert l3.total_variation == pytest.approx(0.1, abs=0.03) and l3.total_variation > l3.chance
    assert all(s.expert < 8 and s.share_b > s.share_a for s in l3.gained)
    assert all(s.expert >= 8 and s.share_b < s.share_a for s in l3.lost)


def test_of_a_hundred_comparisons_of_the_same_few_name_a_layer() -> None:
    assert sum(any(r.changed for r in _routing(seed)) for seed in range(1, 101)) <= 5


def test_few_forwards_fall_back_to_tokens() -> None:
    found = _routing(0, moved=0.9, units=1, slots=4000)
    assert {r.chance_from for r in found} == {"tokens"} and found[3].changed
    assert not any(r.changed for r in _routing(1, units=1, slots=4000))
    assert not any(r.changed for r in _routing(0, moved=0.9, units=1)), "20 tokens of a text count as one"


def test_another_model_is_said_to_be_one(tmp_path: Path) -> None:
    def rename(payload: dict[str, Any]) -> None:
        text = json.dumps(payload).replace("L0", "X0").replace("model.layers", "encoder.blocks")
        payload.clear()
        payload.update(json.loads(text))

    a = read_summary(H200 / "prefill_eager.pt.trace.json.gz")
    found = compare(a, summary_of(tmp_path / "b.json", rename))
    assert found.setup and not found.routing and not found.changes
    assert "share no router" in found.notes[-1] and "Changed: set-up" in render_diff_text(found)


# -- CSV ----------------------------------------------------------------------------------------------


def test_one_guard_against_formulas(tmp_path: Path) -> None:
    assert csv_text(["=a", "b"], [["+1+1", None], ["@x", [1, 2]], [-1.5, float("nan")]]) == (
        "'=a,b\n'+1+1,\n'@x,1 2\n-1.5,\n"
    )
    a = summary_of(tmp_path / "a.json")
    assert render_diff_csv(compare(a, a)).startswith("site,metric,a,b,difference,relative,low,high,verdict")


@pytest.mark.parametrize(("kernels", "span"), [("noise", "host"), ("changed", "changed")])
def test_the_pace_of_the_host_is_no_change_of_the_work(kernels: Any, span: str) -> None:
    def change(metric: str, verdict: Any) -> Change:
        return Change(
            site="L00", metric=metric, a=1.0, b=1.5, low=0.4, high=0.6, verdict=verdict, stage="prefill"
        )

    given = [change("device_span_p50", "changed"), change("device_busy_p50", kernels)]
    found = [one.verdict for one in _host_apart([*given, change("load_cv", "changed")])]
    assert found == [span, kernels, "changed"]
    on_cpu = [change("host_p50", "changed")]
    assert list(_host_apart(on_cpu)) == on_cpu, "there the host's time is the work"


@pytest.mark.parametrize(
    ("b", "floor", "verdict"),
    [
        (125.0, 0.0, "changed"),  # beyond noise within the runs
        (125.0, 0.3, "noise"),
        (140.0, 0.3, "noise"),  # more than the limit, but the interval is not
        (170.0, 0.3, "changed"),
        (100 / 1.25, 0.0, "changed"),
        (100 / 1.25, 0.3, "noise"),
        (100 / 1.7, 0.3, "changed"),
    ],
)
def test_a_change_on_the_hosts_clock_lies_beyond_the_floor_as_a_whole(
    b: float, floor: float, verdict: str
) -> None:
    sides = (Estimate(100.0, 2.0, 20), Estimate(b, 2.0, 20))
    forth, back = (
        _change("all", "experts_p50", "train", pair, 0.999, floor) for pair in (sides, sides[::-1])
    )
    assert forth.verdict == back.verdict == verdict, "as much for B against A as for A against B"


def test_the_floor_is_of_times_on_the_hosts_clock_alone(tmp_path: Path) -> None:
    """Kernels have none; without a device all times have one, and the answer names it."""
    a = read_summary(H200 / "prefill_eager.pt.trace.json.gz")
    floors = {c.metric: c.floor for c in compare(a, a, host_floor=0.2).changes}
    assert {metric for metric, floor in floors.items() if floor} == {"host_p50"}
    host = replace(
        a, times=_on_host(a), stages={s: replace(p, times=_on_host(p)) for s, p in a.stages.items()}
    )
    found = compare(host, host, host_floor=0.2)
    timed = {c.metric for c in found.changes if c.floor == 0.2}
    assert {"experts_p50", "experts_share", "host_p50"} <= timed and not timed & {"load_cv", "confidence"}
    assert not any("Host clock" in note for note in found.notes), "without an interval the limit says nothing"
