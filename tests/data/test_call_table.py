"""The table of calls: its rows are the samples it was made of, its sums those of a plain loop."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace.data.calls.sample import Placement, RoutingSample, Span
from moe_trace.data.calls.table import CallTable, load_by_step, mean_over_calls, mean_over_tokens
from moe_trace.data.summary import distribution

COUNTS = st.lists(st.integers(0, 2**40), max_size=5).map(lambda row: np.array(row, np.int64))
FIGURE = st.none() | st.floats(0, 10)
SPANS = st.dictionaries(
    st.sampled_from(["router", "experts", "block", "graph"]),
    st.builds(Span, st.floats(0, 1e9), st.floats(0, 1e6)),
)
PLACES = st.none() | st.builds(
    Placement, host=SPANS, device=SPANS, busy_us=st.dictionaries(st.just("router"), st.floats(0, 9))
)


@st.composite
def samples(draw: st.DrawFn) -> list[RoutingSample]:
    found = []
    for _ in range(draw(st.integers(0, 6))):
        layer = draw(st.integers(0, 2))
        found.append(
            RoutingSample(
                site=f"L{layer:02d}",
                name=f"layers.{layer}.gate",
                layer=layer,
                call=draw(st.integers(0, 9)),
                step=draw(st.integers(-2, 2)),
                phase=draw(st.sampled_from(["forward", "recompute"])),
                stage=draw(st.sampled_from(["prefill", "decode", "train"])),
                tokens=draw(st.integers(5, 9)),
                top_k=2,
                assignments=draw(COUNTS),
                skipped=1,
                computed_slots=2,
                padding_assignments=3,
                nonfinite_tokens=draw(st.integers(0, 5)),
                router_entropy=draw(FIGURE),
                confidence=None,
                top1_prob=draw(FIGURE),
                topk_mass=draw(FIGURE),
                z_loss=draw(FIGURE),
                k_histogram=draw(COUNTS),
                router_flops=2**61,
                expert_flops=draw(st.integers(0, 2**62)),
                memory_allocated_bytes=draw(st.none() | st.integers(0, 2**40)),
                host_start_ns=draw(st.integers(0, 2**62)),
                host_end_ns=draw(st.integers(0, 2**62)),
                thread=7,
                profiled=draw(st.booleans()),
                placement=draw(PLACES),
                aux_loss=draw(FIGURE),
                in_graph=draw(st.booleans()),
                dispatched=draw(st.none() | COUNTS),
                graph_forward=draw(st.none() | st.integers(0, 9)),
                slot_bytes=draw(st.none() | st.integers(0, 9)),
            )
        )
    return found


def plain(sample: RoutingSample) -> dict[str, Any]:
    values = {f.name: getattr(sample, f.name) for f in fields(RoutingSample)}
    return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}


@settings(max_examples=40)
@given(samples())
def test_rows_are_the_samples(given_samples: list[RoutingSample]) -> None:
    table = CallTable.of(given_samples)
    assert list(map(plain, table)) == list(map(plain, given_samples))
    assert [plain(table[i]) for i in range(len(table))] == list(map(plain, given_samples))
    assert list(map(plain, table[1:3])) == list(map(plain, given_samples[1:3]))


@settings(max_examples=40)
@given(samples(), samples())
def test_two_tables_make_one(a: list[RoutingSample], b: list[RoutingSample]) -> None:
    both = CallTable.concatenated([CallTable.of(a), CallTable.of(b)])
    assert list(map(plain, both)) == list(map(plain, a + b))


@settings(max_examples=40)
@given(samples())
def test_sums_are_those_of_a_loop(given_samples: list[RoutingSample]) -> None:
    table = CallTable.of(given_samples)
    names = ["layers.2.gate", "layers.0.gate"]
    steps, loads_SLE = load_by_step(table, names, least=2)
    expected: dict[Any, Any] = defaultdict(lambda: [0] * loads_SLE.shape[2])
    forward = [s for s in given_samples if s.phase == "forward"]
    for s in forward:
        for expert, count in enumerate(s.assignments.tolist()):
            if s.name in names:
                expected[s.step, s.name][expert] += count
    assert steps.tolist() == sorted({s.step for s in forward})
    for i, step in enumerate(steps.tolist()):
        assert [loads_SLE[i, j].tolist() for j in range(2)] == [expected[step, name] for name in names]
    # Of 2**61 each: from four calls on, beyond what 64 bits hold.
    assert table.total("router_flops") == 2**61 * len(given_samples)
    assert table.total("expert_flops") == sum(s.expert_flops for s in given_samples)
    assert table.assignments.totals().tolist() == [int(s.assignments.sum()) for s in given_samples]
    assert table.assignments.used().tolist() == [np.count_nonzero(s.assignments) for s in given_samples]


@settings(max_examples=40)
@given(samples())
def test_means_leave_out_what_is_not_known(given_samples: list[RoutingSample]) -> None:
    table = CallTable.of(given_samples)
    known = [s for s in given_samples if s.router_entropy is not None]
    weights = [s.tokens - s.nonfinite_tokens for s in known]
    expected = sum(w * (s.router_entropy or 0) for w, s in zip(weights, known, strict=True))
    found = mean_over_tokens(table, "router_entropy")
    assert found == (pytest.approx(expected / sum(weights)) if sum(weights) else None)
    losses = [s.aux_loss for s in given_samples if s.aux_loss is not None]
    assert mean_over_calls(table, "aux_loss") == (pytest.approx(np.mean(losses)) if losses else None)
    assert mean_over_tokens(table, "confidence") is None


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=50))
def test_a_distribution_has_numpys_percentiles(values: list[float]) -> None:
    found = distribution(values)
    assert found is not None
    expected = np.percentile(values, (50, 95, 99))
    assert (found.p50, found.p95, found.p99) == pytest.approx(tuple(expected), rel=1e-12, abs=1e-12)
