"""Tests of load metrics on routing of the real OLMoE-1B-7B, against plain Python and numbers by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace.data.calls.ragged import CountLists
from moe_trace.data.load_stats import describe_load, describe_loads
from paths import DATA

COUNTS = json.loads((DATA / "olmoe_expert_counts.json").read_text())


def independent(counts: list[int]) -> tuple[float, float, float, float]:
    """By the definitions: all pairs for Gini, sums for the others."""
    n, total = len(counts), sum(counts)
    mean = total / n
    cv = math.sqrt(sum((c - mean) ** 2 for c in counts) / n) / mean
    pairs = sum(abs(a - b) for a in counts for b in counts)
    entropy = -sum(c / total * math.log(c / total) for c in counts if c) / math.log(n)
    return max(counts) / mean, cv, pairs / (2 * n * n * mean), entropy


@pytest.mark.parametrize("domain", sorted(COUNTS["counts"]))
@pytest.mark.parametrize("index", range(3))
def test_real_routing(domain: str, index: int) -> None:
    counts = COUNTS["counts"][domain][index]
    load = describe_load(counts)
    assert (load.max_over_mean, load.cv, load.gini, load.entropy) == pytest.approx(
        independent(counts), rel=1e-9
    )


@pytest.mark.parametrize(
    ("domain", "layer", "expected"),
    [("c4", 0, (3.0165, 0.3242, 0.1371, 0.9897)), ("arxiv", 7, (6.2831, 1.2772, 0.5517, 0.8661))],
)
def test_published_figures(domain: str, layer: int, expected: tuple[float, ...]) -> None:
    load = describe_load(COUNTS["counts"][domain][COUNTS["layers"].index(layer)])
    assert (load.max_over_mean, load.cv, load.gini, load.entropy) == pytest.approx(expected, abs=5e-5)


@given(st.lists(st.lists(st.integers(0, 9) | st.just(0), min_size=1, max_size=70), max_size=12))
@settings(max_examples=40, deadline=None)
def test_many_loads_at_once_are_those_of_each_to_the_bit(counts: list[list[int]]) -> None:
    many = describe_loads(CountLists.of(counts))
    for i, each in enumerate(map(describe_load, counts)):
        for name in ("max_over_mean", "cv", "gini", "entropy", "active_experts"):
            value = getattr(many, name)[i]
            assert getattr(each, name) == (None if value != value else value)


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=64).filter(any))
def test_any_load(counts: list[int]) -> None:
    load = describe_load(counts)
    assert (load.max_over_mean, load.cv, load.gini, load.entropy) == pytest.approx(
        independent(counts), rel=1e-9, abs=1e-9
    )
    assert load.active_experts + len(load.dead_experts) == len(counts)
