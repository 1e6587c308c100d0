"""Property tests of plans on arbitrary counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_truth import best_makespan, rank_loads, walk_slots

from moe_trace.data.errors import UsageError
from moe_trace.placement.evaluation import judge, least_without_copies
from moe_trace.placement.packing import by_bin, normalised, pack, replicate
from moe_trace.placement.plan import Cluster, Plan, contiguous_plan
from moe_trace.placement.planner import PlanOptions, blocks_of, make_plans
from moe_trace.placement.refine import refine

SETTINGS = settings(max_examples=20, deadline=None)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, PlanOptions]:
    """[S, L, E] counts with a load in every layer and step, and options that fit."""
    per_node = draw(st.sampled_from([1, 2, 4]))
    nodes = draw(st.sampled_from([1, 2, 3]))
    ranks = per_node * nodes
    experts = ranks * draw(st.integers(1, 4))
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 3)), experts)
    seed = draw(st.integers(0, 2**32 - 1))
    skew = draw(st.sampled_from([0.0, 0.5, 2.0]))
    random = np.random.default_rng(seed)
    counts = random.poisson(20 * random.lognormal(0, skew, shape[1:]), shape)
    counts[:, :, 0] += 1
    return counts.astype(np.int64), PlanOptions(
        cluster=Cluster(ranks, nodes), replicas=draw(st.integers(1, 3)), hedge=draw(st.booleans())
    )


@SETTINGS
@given(cases())
def test_every_plan_is_a_placement(case: tuple[np.ndarray, PlanOptions]) -> None:
    counts, options = case
    plans = make_plans(blocks_of(counts), options)
    names = ["contiguous", "balanced", "replicated"] + ["hierarchical"] * (options.cluster.nodes > 1)
    assert [plan.name for plan in plans] == names
    for plan in plans:
        copies = plan.copies_LER()
        assert (copies.sum(axis=2) >= 1).all(), "an expert is nowhere"
        assert (copies.sum(axis=1) == plan.slots_per_rank).all(), "ranks of different sizes"
        extra = options.replicas if plan.name in ("replicated", "hierarchical") else 0
        assert plan.slots_per_rank == counts.shape[2] // options.cluster.ranks + extra
        if not extra:
            assert (np.sort(plan.experts_LP, axis=1) == np.arange(counts.shape[2])).all()
        judged = judge(plan, counts)
        assert np.allclose(judged.loads_LR.sum(axis=1), counts.sum(axis=(0, 2))), "load was lost or made"
        for layer in range(counts.shape[1]):
            assert np.allclose(judged.loads_LR[layer], rank_loads(plan, layer, counts[:, layer].sum(axis=0)))


@SETTINGS
@given(cases())
def test_balanced_is_never_worse_where_it_was_chosen(case: tuple[np.ndarray, PlanOptions]) -> None:
    counts, options = case
    plans = {plan.name: judge(plan, counts) for plan in make_plans(blocks_of(counts, 1), options)}
    contiguous, balanced = plans["contiguous"].max_over_mean_L, plans["balanced"].max_over_mean_L
    assert (balanced <= contiguous + 1e-9).all()
    assert (balanced >= least_without_copies(counts, options.cluster.ranks) - 1e-9).all()


@SETTINGS
@given(cases())
def test_of_several_blocks_their_mean_is_never_worse(case: tuple[np.ndarray, PlanOptions]) -> None:
    counts, options = case
    contiguous, balanced, *_ = make_plans(blocks_of(counts, 8), options)
    each = [judge(plan, counts).per_observation_L for plan in (contiguous, balanced)]
    assert (each[1] <= each[0] + 1e-9).all()


@SETTINGS
@given(st.lists(st.integers(0, 50), min_size=6, max_size=6), st.sampled_from([2, 3]))
def test_balanced_is_close_to_the_best_there_is(loads: list[int], ranks: int) -> None:
    """Exhaustive search; Graham's bound for LPT is 4/3 - 1/(3 ranks), swaps do better than that."""
    if not any(loads):
        return
    counts = np.array([[loads]])
    plan = make_plans(blocks_of(counts), PlanOptions(cluster=Cluster(ranks)))[1]
    best = best_makespan(loads, ranks, len(loads) // ranks)
    assert best <= max(rank_loads(plan, 0, counts[0, 0])) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9


@SETTINGS
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(2, 3))
def test_largest_first_keeps_to_grahams_bound(loads: list[int], bins: int) -> None:
    """Where no bin fills up: empty items make room for all in any bin."""
    padded = loads + [0] * (len(loads) * (bins - 1))
    weights = normalised(np.array(padded, float)[None, :, None], bins)
    bin_I = pack(weights, bins)[0]
    busiest = np.bincount(bin_I, padded, bins).max()
    assert busiest <= best_makespan(loads, bins) * (4 / 3 - 1 / (3 * bins)) + 1e-9


@SETTINGS
@given(cases())
def test_swaps_never_raise_the_cost_and_keep_bins_full(case: tuple[np.ndarray, PlanOptions]) -> None:
    counts, options = case
    ranks = options.cluster.ranks
    weights = normalised(blocks_of(counts), ranks)
    start = by_bin(pack(weights, ranks))
    done = refine(start, weights, ranks)

    def cost(order: np.ndarray) -> np.ndarray:
        values = np.take_along_axis(weights, order[:, :, None], axis=1)
        loads = values.reshape(len(order), ranks, -1, values.shape[2]).sum(axis=2)
        return (loads**8).sum(axis=(1, 2))

    assert (np.sort(done, axis=1) == np.arange(counts.shape[2])).all()
    assert (cost(done) <= cost(start) * (1 + 1e-9)).all()


@SETTINGS
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=6),
    st.integers(0, 6),
)
def test_copies_make_the_heaviest_one_as_light_as_they_can(loads: list[int], extra: int) -> None:
    """Against all ways to hand out the copies."""
    weights = np.array(loads, float)[None, :, None]
    copies = replicate(weights, extra, most=99)[0]
    assert copies.sum() == len(loads) + extra and copies.min() >= 1

    def ways(experts: int, left: int) -> list[list[int]]:
        if experts == 1:
            return [[left]]
        return [[n, *rest] for n in range(left + 1) for rest in ways(experts - 1, left - n)]

    best = min(max(w / (1 + n) for w, n in zip(loads, way, strict=True)) for way in ways(len(loads), extra))
    assert max(w / c for w, c in zip(loads, copies, strict=True)) == pytest.approx(best)


@SETTINGS
@given(cases())
def test_copies_stand_on_ranks_of_their_own(case: tuple[np.ndarray, PlanOptions]) -> None:
    """A second copy on the same rank would help nobody; where there is room they are apart."""
    counts, options = case
    plans = make_plans(blocks_of(counts), options)
    experts, ranks = counts.shape[2], options.cluster.ranks
    if options.replicas * ranks <= experts * (ranks - 1):
        assert plans[2].copies_LER().max() == 1
    here = options.cluster.ranks_per_node
    if options.cluster.nodes > 1 and options.replicas * here <= experts // options.cluster.nodes * (here - 1):
        assert plans[3].copies_LER().max() == 1


@SETTINGS
@given(cases())
def test_hierarchical_keeps_copies_on_one_node(case: tuple[np.ndarray, PlanOptions]) -> None:
    counts, options = case
    if options.cluster.nodes == 1:
        return
    plan = make_plans(blocks_of(counts), options)[3]
    copies = plan.copies_LER()
    by_node = copies.reshape(*copies.shape[:2], options.cluster.nodes, -1).sum(axis=3)
    assert ((by_node > 0).sum(axis=2) == 1).all()


@SETTINGS
@given(cases())
def test_volume_equals_slots_sent_one_by_one(case: tuple[np.ndarray, PlanOptions]) -> None:
    counts, options = case
    for plan in make_plans(blocks_of(counts), options):
        copies = plan.copies_LER().sum(axis=2)
        scaled = np.zeros((1, *copies.shape), np.int64)
        sent = np.zeros((3, copies.shape[0]))
        for layer, row in enumerate(copies):
            for expert, number in enumerate(row.tolist()):
                slots = int(np.lcm(plan.cluster.ranks, number)) * int(counts[0, layer, expert] % 3)
                scaled[0, layer, expert] = slots
                if slots:
                    sent[:, layer] += walk_slots(plan, layer, expert, slots)
        assert np.allclose(judge(plan, scaled).slots_WL, sent)


def test_contiguous_moves_all_but_its_own_part() -> None:
    """4 ranks on 2 nodes: a quarter stays, a quarter goes to the neighbour, half crosses nodes."""
    plan = contiguous_plan(1, 8, Cluster(4, 2))
    moved = judge(plan, np.full((2, 1, 8), 50)).slots_WL[:, 0]
    assert moved == pytest.approx([200, 200, 400])


def test_groups_stay_together() -> None:
    counts = np.random.default_rng(3).poisson(30, (1, 2, 32))
    options = PlanOptions(cluster=Cluster(8, 2), groups=4)
    plan = make_plans(blocks_of(counts), options)[3]
    node_of_slot = np.arange(plan.experts_LP.shape[1]) // (plan.experts_LP.shape[1] // 2)
    for row in plan.experts_LP:
        for group in range(4):
            assert len(set(node_of_slot[row // 8 == group])) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cluster(0), "0 ranks"),
        (lambda: Cluster(8, 0), "0 nodes"),
        (lambda: Cluster(8, 3), "choose --nodes from 1, 2, 4, 8"),
        (lambda: contiguous_plan(1, 64, Cluster(7)), "choose --ranks from 1, 2, 4, 8, 16, 32, 64"),
        (lambda: _plans(PlanOptions(cluster=Cluster(2), replicas=0)), "found --replicas 0"),
        (lambda: _plans(PlanOptions(cluster=Cluster(2), replicas=1000)), "found --replicas 1000"),
        (lambda: _plans(PlanOptions(cluster=Cluster(2, 2), groups=3)), "choose --groups from 2, 4, 8"),
        (lambda: _plans(PlanOptions(cluster=Cluster(2), groups=0)), "found 0 groups"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()  # type: ignore[operator]


def _plans(options: PlanOptions) -> tuple[Plan, ...]:
    return make_plans(np.ones((1, 8, 1)), options)
