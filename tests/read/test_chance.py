"""Tests of bounds of the load and its chance level, against enumeration, simulation and ties in traces."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from moe_trace.data.load_stats import (
    SIGNIFICANT,
    TOKENS_ALIKE,
    Chance,
    describe_chance,
    describe_load,
    most_uneven,
)
from moe_trace.read.reader import read_summary
from moe_trace.show.text import render_text
from paths import DATA

H100 = DATA / "h100" / "prefill_decode_16_layers.pt.trace.json.gz"


def chance_of(counts: list[int], tokens: int, top_k: int) -> Chance:
    histogram = [0] * (top_k + 1)
    histogram[top_k] = tokens
    return describe_chance(counts, histogram)


def uniform(random: np.random.Generator, experts: int, top_k: int, tokens: int) -> list[int]:
    chosen = random.random((tokens, experts)).argsort(axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=experts).tolist()


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 2, 2), (4, 1, 3), (5, 2, 2), (3, 2, 3)])
def test_every_routing_of_a_few_tokens(experts: int, top_k: int, tokens: int) -> None:
    """Floor, ceiling, the CV of chance and the p-value, by writing all routings down."""
    sets = list(itertools.combinations(range(experts), top_k))
    loads = []
    for choice in itertools.product(sets, repeat=tokens):
        loads.append(np.bincount(list(itertools.chain(*choice)), minlength=experts).tolist())
    ratios = [max(load) * experts / (tokens * top_k) for load in loads]
    squares = [(np.std(load) / np.mean(load)) ** 2 for load in loads]
    for load, square in zip(loads, squares, strict=True):
        chance = chance_of(load, tokens, top_k)
        assert (chance.floor, chance.ceiling) == pytest.approx((min(ratios), max(ratios)))
        assert chance.cv == pytest.approx(math.sqrt(np.mean(squares)))
        assert chance.cv_beyond == pytest.approx(math.sqrt(max(0.0, square - np.mean(squares))), abs=1e-6)
        exact = np.mean([other >= square - 1e-12 for other in squares])
        assert chance.p_value is not None and chance.p_value == pytest.approx(exact, abs=0.02)
        runs = chance_of([20 * n for n in load], 20 * tokens, top_k)  # 20 tokens that choose as one
        assert runs.cv_clustered == pytest.approx(chance.cv)


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (8, 2), (256, 8)])
def test_one_token_says_nothing(experts: int, top_k: int) -> None:
    """Whatever it chooses, the figures are the same: the floor is the ceiling."""
    for first in range(0, experts - top_k, 7):
        counts = [int(first <= expert < first + top_k) for expert in range(experts)]
        chance, load = chance_of(counts, 1, top_k), describe_load(counts)
        assert chance.floor == chance.ceiling == load.max_over_mean == experts / top_k
        assert chance.p_value is None and chance.cv_beyond == 0 and not chance.is_real
        assert chance.cv == pytest.approx(load.cv) and not chance.tells_dead


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens"),
    [(64, 8, 2), (64, 8, 10), (64, 8, 40), (64, 8, 1000), (8, 2, 5), (8, 2, 300), (16, 4, 64), (256, 8, 60)],
)
def test_uniform_routing_is_called_chance(experts: int, top_k: int, tokens: int) -> None:
    """Of 400 uniform routings about 1 % have a p-value under 0.01, and hardly one under 0.001."""
    random = np.random.default_rng(7)
    p_values = [chance_of(uniform(random, experts, top_k, tokens), tokens, top_k).p_value for _ in range(400)]
    known = [p for p in p_values if p is not None]
    assert len(known) == 400
    assert sum(p < 0.01 for p in known) <= 12 and sum(p < SIGNIFICANT for p in known) <= 3
    if tokens >= 40:
        assert 0.38 <= np.mean(known) <= 0.62


def test_a_preference_is_found_and_its_size_does_not_depend_on_the_tokens() -> None:
    """Two of 64 experts are chosen three times as often: unseen in 4 tokens, plain in 4000."""
    random = np.random.default_rng(3)
    weights = np.ones(64)
    weights[:2] = 3
    beyond = []
    for tokens in (4, 400, 4000, 40_000):
        keys = -np.log(random.random((tokens, 64))) / weights
        counts = np.bincount(keys.argsort(axis=1)[:, :8].ravel(), minlength=64).tolist()
        chance = chance_of(counts, tokens, 8)
        assert chance.is_real == (tokens >= 4000)
        assert chance.says_nothing == (tokens == 4)
        assert chance.p_value is not None and (chance.p_value < 1e-9) == (tokens > 4)
        beyond.append(chance.cv_beyond)
    assert beyond[2] == pytest.approx(beyond[3], rel=0.1)
    assert beyond[1] == pytest.approx(beyond[3], rel=0.3)


def test_slots_of_one_token_may_fall_on_one_expert() -> None:
    """Then each slot chooses by itself, and the ceiling is E."""
    chance = describe_chance([0, 5, 190, 5], [0, 0, 100])
    assert chance.ceiling == 4 and chance.is_real


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(64, 8, 400), (64, 8, 2000), (8, 2, 200)])
def test_tokens_that_choose_like_their_neighbours_are_called_chance(
    experts: int, top_k: int, tokens: int
) -> None:
    """Runs of tokens that choose as one: taken as independent, nearly all are far beyond chance."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(300):
        runs = uniform(random, experts, top_k, tokens // TOKENS_ALIKE)
        found.append(chance_of([n * TOKENS_ALIKE for n in runs], tokens, top_k))
    assert sum(chance.p_value is not None and chance.p_value < SIGNIFICANT for chance in found) > 290
    assert sum(chance.is_real for chance in found) <= 3
    assert sum(chance.p_value_clustered < 0.05 for chance in found if chance.p_value_clustered) <= 30


def test_a_few_tokens_say_nothing() -> None:
    """Three decode steps that chose the same experts, with the truth about their independence unknown."""
    decode = read_summary(H100).by_stage()["decode"]
    assert all(r.chance.says_nothing and not r.chance.is_real for r in decode.routers)
    assert decode.most_imbalanced_layer() is None
    text = " ".join(render_text(decode).split())
    assert "So few tokens say nothing about balance" in text and "Most uneven" not in text


def test_the_most_uneven_layer_is_no_tie_at_the_ceiling() -> None:
    """Four layers of the prefill stand at max÷mean = 8.000; the figure beyond chance names one."""
    stages = read_summary(H100).by_stage()
    prefill = stages["prefill"]
    at_ceiling = [r.info.site for r in prefill.routers if r.load.max_over_mean == r.chance.ceiling == 8.0]
    assert len(at_ceiling) == 4
    worst = prefill.most_imbalanced_layer()
    assert worst is not None and worst.info.site == "L15"
    assert worst.load.cv == max(r.load.cv or 0 for r in prefill.routers)
    twin = dataclasses.replace(prefill.routers[3], chance=worst.chance, load=worst.load)
    routers = (*prefill.routers[:3], twin, *prefill.routers[4:])
    assert most_uneven([r.chance for r in routers]) == [3, 15]
    text = " ".join(render_text(dataclasses.replace(prefill, routers=routers)).split())
    assert (
        f"Most uneven: L03, L15 (2 tied, CV {worst.load.cv:.3f}, by chance {worst.chance.cv_clustered:.3f})"
        in text
    )


def test_dead_needs_enough_tokens() -> None:
    """17 experts of the 64 are dead after 2048 tokens; after 3 tokens nobody can say."""
    stages = read_summary(H100).by_stage()
    assert len(stages["prefill"].dead_experts()["L01"]) == 17
    assert stages["decode"].dead_experts() == {}
    assert all(len(r.load.dead_experts) > 50 for r in stages["decode"].routers)
    assert "dead_experts" not in {f.rule for f in stages["decode"].findings}
    assert "dead: - below 20 assignments an expert" in " ".join(render_text(stages["decode"]).split())
