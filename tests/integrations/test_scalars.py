"""Tests of the scalars of a step: all calls together, each weighted by the tokens of its metric."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from moe_trace.data.calls.sample import RoutingSample
from moe_trace.integrations.scalars import scalar_points, step_loads


def call(layer: int, step: int, assignments: list[int], **fields: Any) -> RoutingSample:
    tokens = sum(assignments) // 2
    return RoutingSample(
        **{
            **dict(site=f"L{layer:02d}", name=f"layers.{layer}", layer=layer, call=0, step=step),
            **dict(phase="forward", stage="train", tokens=tokens, top_k=2),
            **dict(assignments=np.array(assignments), k_histogram=np.array([0, 0, tokens]), skipped=0),
            **dict(computed_slots=2 * tokens, padding_assignments=0, nonfinite_tokens=0),
            **dict(router_entropy=None, confidence=None, top1_prob=None, topk_mass=None, z_loss=None),
            **dict(router_flops=0, expert_flops=0, memory_allocated_bytes=None, thread=1, profiled=False),
            **dict(host_start_ns=0, host_end_ns=0),
            **fields,
        }
    )


def points(*calls: RoutingSample) -> dict[tuple[str, int], float]:
    return {(tag, step): value for tag, value, step in scalar_points(list(calls))}


def test_means_weigh_each_call_by_its_finite_tokens() -> None:
    """10 tokens, of which 8 have no finite logits, weigh 2; 30 weigh 30."""
    found = points(
        call(0, 3, [10, 10], router_entropy=0.5, nonfinite_tokens=8, confidence=1.0),
        call(0, 3, [30, 30], router_entropy=0.1, confidence=None),
    )
    assert found["moe_router_entropy/L00", 3] == pytest.approx((2 * 0.5 + 30 * 0.1) / 32)
    assert found["moe_router_confidence/L00", 3] == 1.0


def test_loads_of_a_step_are_summed_before_they_are_compared() -> None:
    found = points(call(0, 0, [4, 0]), call(0, 0, [0, 4]), call(1, 0, [6, 2]), call(1, 1, [2, 6]))
    assert found["moe_load_max_over_mean/L00", 0] == 1.0
    assert found["moe_load_cv/L00", 0] == 0.0
    assert found["moe_load_max_over_mean/L01", 0] == 1.5
    assert found["moe_load_cv/L01", 1] == 0.5
    assert found["moe_load_max_over_mean/mean", 0] == 1.25
    assert found["moe_load_max_over_mean/mean", 1] == 1.5  # of the one layer that ran


def test_layers_of_different_sizes_are_each_compared_with_their_own_mean() -> None:
    found = points(call(0, 0, [2, 2, 2, 2]), call(1, 0, [6, 2]))
    assert (found["moe_load_max_over_mean/L00", 0], found["moe_load_max_over_mean/L01", 0]) == (1.0, 1.5)
    assert found["moe_load_cv/L00", 0] == 0.0


def test_what_is_not_known_is_left_out() -> None:
    again = call(0, 0, [2, 2], phase="recompute", router_entropy=9.0)
    found = points(call(0, 0, [2, 2], aux_loss=None, skipped=1), again)
    assert {tag for tag, _ in found} == {
        f"moe_{figure}/{what}"
        for figure in ("load_max_over_mean", "load_cv", "skipped_share")
        for what in ("L00", "mean")
    }
    assert found["moe_skipped_share/L00", 0] == 0.25
    assert not any(math.isnan(value) for value in found.values())
    assert points() == {}


def test_the_pictures_steps_are_spread_over_the_recording() -> None:
    calls = [call(layer, step, [step, 2 * layer]) for step in range(10) for layer in (1, 0)]
    loads = step_loads(calls, 3)
    assert list(loads) == [0, 4, 9]
    assert [row.tolist() for row in loads[4]] == [[4, 0], [4, 2]]
