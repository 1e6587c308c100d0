"""The simulated cache against a plain loop over steps, and Belady against every possible choice."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn_routes import drawn_routes, plain_tokens
from moe_trace.data.errors import UsageError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.cache import stack as stack_module
from moe_trace.read.routes.cache.belady import belady_hits
from moe_trace.read.routes.cache.simulate import POLICIES, simulate
from moe_trace.read.routes.cache.stack import places
from moe_trace.read.routes.sets import expert_sets
from tiny_routes import decoded_routes

some = settings(max_examples=40, deadline=None)
Step = set[int]


def steps_of(routes: RecordedRoutes, layer: int, together: str) -> list[Step]:
    """What each step needs of one layer, lost calls nothing."""
    unlost = plain_tokens(replace(routes, lost_layers=None), layer)
    if together == "token":
        return [set(token["experts"]) for token in unlost]
    steps: dict[int, Step] = {}
    for token in unlost:
        steps.setdefault(token["forward"], set()).update(token["experts"])
    return [steps[number] for number in sorted(steps)]


def plain_hits(policy: str, steps: list[Step], size: int) -> int:
    """A loop with a set of what is in memory."""
    held: Step = set()
    seen: Step = set()
    last: dict[int, int] = {}
    count: Counter[int] = Counter()
    totals = Counter(e for needed in steps for e in needed)
    best = set(sorted(totals, key=lambda e: (-totals[e], -e))[:size])
    hits = 0
    for now, needed in enumerate(steps):
        hits += len(needed & held)
        seen |= needed
        count.update(needed)
        last |= dict.fromkeys(needed, now)
        if policy == "lru":
            order = sorted(held | needed, key=lambda e: (last[e], e))
        elif policy == "lfu":
            order = sorted(held | needed, key=lambda e: (count[e], e))
        else:
            order = sorted(seen & best)
        held = set(order[-size:])
    return hits


def most_hits(steps: list[Step], size: int) -> int:
    """Over every choice of what to keep."""
    reached: dict[frozenset[int], int] = {frozenset(): 0}
    for needed in steps:
        after: dict[frozenset[int], int] = {}
        for held, hits in reached.items():
            there = held | needed
            kept = itertools.combinations(sorted(there), min(size, len(there)))
            for choice in map(frozenset, kept):
                after[choice] = max(after.get(choice, 0), hits + len(held & needed))
        reached = after
    return max(reached.values())


@some
@given(
    drawn_routes(),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from(["forward", "token"]),
)
def test_each_policy_hits_what_a_plain_loop_hits(
    routes: RecordedRoutes, sizes: list[int], together: Any
) -> None:
    found = simulate(routes, sizes, ["lru", "lfu", "static"], together=together, expert_bytes=7)
    plain = [steps_of(routes, layer, together) for layer in range(len(routes.layers))]
    assert found.steps == found.steps_recorded == len(plain[0])
    assert len(found.results) == (3 * len(sizes) if found.steps else 0)
    for result in found.results:
        assert result.requests.tolist() == [sum(map(len, steps)) for steps in plain]
        size = result.experts_in_memory
        assert result.hits.tolist() == [plain_hits(result.policy, steps, size) for steps in plain]
        missed = result.requests.sum() - result.hits.sum()
        assert result.bytes_per_token == pytest.approx(7 * missed / found.tokens)
        if size <= max(routes.num_experts) and result.requests.sum():
            assert found.curves[result.policy][size - 1] == pytest.approx(result.hit_rate)


@some
@given(st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=1, max_size=7), st.integers(1, 5))
def test_belady_hits_as_much_as_the_best_of_all_choices(steps: list[Step], size: int) -> None:
    sets = expert_sets(np.array([[*sorted(step), *[9] * (4 - len(step))] for step in steps], np.uint8), 6)
    assert sum(belady_hits([sets], [size]))[0, 0] == most_hits(steps, size)


@some
@given(drawn_routes(), st.booleans())
def test_belady_is_never_beaten(routes: RecordedRoutes, shared: bool) -> None:
    found = simulate(routes, [1, 3, 8, 100], shared=shared)
    best = {r.experts_in_memory: r.hits for r in found.results if r.policy == "belady"}
    for result in found.results:
        beaten = result.hits.sum() if shared else result.hits
        assert np.all(
            beaten <= (best[result.experts_in_memory].sum() if shared else best[result.experts_in_memory])
        )


@some
@given(drawn_routes(), st.integers(1, 6))
def test_a_shared_memory_takes_the_layers_one_after_the_other(routes: RecordedRoutes, size: int) -> None:
    layers = range(len(routes.layers))
    each = [steps_of(routes, layer, "forward") for layer in layers]
    joined = [
        {64 * 2 * layer + e for e in each[layer][step]} for step in range(len(each[0])) for layer in layers
    ]
    for result in simulate(routes, [size], ["lru", "lfu", "static"], shared=True).results:
        assert result.hits.sum() == plain_hits(result.policy, joined, size * len(layers))


@some
@given(drawn_routes(layers=2), st.integers(1, 6), st.sampled_from(["lru", "lfu"]))
def test_prefetching_by_transition(routes: RecordedRoutes, size: int, policy: Any) -> None:
    results = simulate(routes, [size], [policy], prefetch_by="transition").results
    first, second = (steps_of(routes, layer, "forward") for layer in (0, 1))
    half = len(first) // 2
    used = Counter(e for step in first[:half] for e in step)
    pairs = Counter(p for a, b in zip(first[:half], second, strict=False) for p in itertools.product(a, b))
    hits = hidden = ahead = 0
    for now in range(half, len(first)):
        held = held_before(policy, second[:now], size)
        held_first = held_before(policy, first[:now], size)
        score = {
            e: sum(pairs[i, e] / used[i] for i in first[now] if used[i]) for e in range(routes.num_experts[1])
        }
        guess = set(sorted(score, key=lambda e: (-round(score[e], 9), e))[: routes.top_k[1]])
        hits += len(second[now] & held) + len(first[now] & held_first)
        hidden += len((second[now] - held) & guess)
        ahead += len(guess - held)
    for result in results:
        fetched = result.prefetch
        assert fetched is not None
        assert fetched.requests == sum(map(len, first[half:] + second[half:]))
        assert fetched.hits == hits
        assert fetched.loaded_ahead == pytest.approx(ahead, abs=0)
        assert fetched.hidden == hidden


def held_before(policy: str, steps: list[Step], size: int) -> Step:
    """What a policy keeps after some steps: an expert is there if asking for it would be a hit."""
    everything = {e for step in steps for e in step}
    return {
        e for e in everything if plain_hits(policy, [*steps, {e}], size) > plain_hits(policy, steps, size)
    }


@given(drawn_routes())
@some
def test_pieces_do_not_show(routes: RecordedRoutes) -> None:
    """The same hits when a few steps at a time are worked on."""
    whole = simulate(routes, [2, 5])
    before = stack_module._CELLS, stack_module._AT_ONCE
    try:
        stack_module._CELLS, stack_module._AT_ONCE = 300, 3
        pieces = simulate(routes, [2, 5], ["lru", "lfu", "static"])
    finally:
        stack_module._CELLS, stack_module._AT_ONCE = before
    for one in pieces.results:
        other = next(
            r for r in whole.results if (r.policy, r.experts_in_memory) == (one.policy, one.experts_in_memory)
        )
        assert one.hits.tolist() == other.hits.tolist()


def test_belady_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_trace.read.routes.cache import belady

    random = np.random.default_rng(0)
    sets = [expert_sets(random.integers(0, 12, (200, 2)).astype(np.uint8), 12) for _ in range(3)]
    whole = sum(belady_hits(sets, [2, 4]))
    monkeypatch.setattr(belady, "_CELLS", 1000)
    assert np.array_equal(whole, sum(belady_hits(sets, [2, 4])))


def test_only_the_first_steps_are_simulated_where_that_is_asked() -> None:
    routes = decoded_routes([[0], [1], [0], [1], [0]])
    found = simulate(routes, [2], ["lru"], most_steps=3)
    assert (found.steps, found.steps_recorded, found.tokens) == (3, 5, 3)
    assert found.results[0].hits.tolist() == [1]
    assert found.results[0].bytes_per_token is None, "nobody said how large an expert is"


def test_a_step_that_needs_more_than_fits_streams_the_rest() -> None:
    found = simulate(decoded_routes([[0, 1, 2], [0, 1, 2]]), [2])
    assert {r.policy: int(r.hits[0]) for r in found.results} == dict.fromkeys(POLICIES, 2)


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ([0], {}, "expected numbers from 1 on"),
        ([], {}, "expected numbers from 1 on"),
        ([1], {"policies": ["fifo"]}, "found policy 'fifo', expected one of lru, lfu, static, belady"),
        ([1], {"prefetch_by": "transition", "shared": True}, "a memory of each layer"),
        ([1], {"prefetch_by": "logits"}, "expected 'transition'"),
        ([1], {"expert_bytes": 0}, "an expert of 0 bytes"),
    ],
)
def test_what_cannot_be_simulated_is_refused(sizes: list[int], options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        simulate(decoded_routes([[0]]), sizes, **options)


def test_a_place_in_the_order_is_the_number_of_experts_used_since() -> None:
    sets = expert_sets(np.array([[0], [1], [2], [1], [0]], np.uint8), 4)
    ((steps, experts, found),) = places("lru", sets)
    assert steps.tolist() == [0, 1, 2, 3, 4] and experts.tolist() == [0, 1, 2, 1, 0]
    assert found.tolist() == [64, 64, 64, 1, 2]
