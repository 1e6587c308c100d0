"""Tests of each metric of `study` against plain code on lists and sets."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from drawn_routes import drawn_routes, plain_runs, plain_tokens
from moe_trace.data.distinct import drawn_distinct
from moe_trace.data.errors import UsageError
from moe_trace.data.load_stats import describe_load
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.compare.comparison import compare_routes
from moe_trace.read.routes.distinct import BATCH_MAX
from moe_trace.read.routes.gates import QUANTILES
from moe_trace.read.routes.study import study
from paths import DATA
from tiny_routes import decoded_routes

some = settings(max_examples=50, deadline=None)


def same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@some
@given(drawn_routes(), st.sampled_from(["all", "adjacent"]))
def test_coactivation_counts_pairs_of_each_token(routes: RecordedRoutes, pairs: Any) -> None:
    for layer, found in enumerate(study([routes], pairs=pairs).layers):
        together, alone = Counter(), Counter()
        for token in plain_tokens(routes, layer):
            alone.update(token["experts"])
            slots = token["slots"]
            chosen = itertools.combinations(slots, 2) if pairs == "all" else itertools.pairwise(slots)
            for i, j in chosen:
                if i is not None and j is not None:
                    together[i, j] += 1
                    together[j, i] += 1
        probability = found.coactivation.probability
        experts = range(found.num_experts)
        assert found.coactivation.together.tolist() == [[together[i, j] for j in experts] for i in experts]
        same(
            probability,
            [[together[i, j] / alone[i] if alone[i] else math.nan for j in experts] for i in experts],
        )
        strongest = found.coactivation.strongest(1)
        assert [p for *_, p in strongest] == ([np.nanmax(probability)] if together else [])


@some
@given(drawn_routes())
def test_locality_follows_the_tokens_of_each_sequence(routes: RecordedRoutes) -> None:
    for layer, found in enumerate(study([routes]).layers):
        runs = [[set(token["experts"]) for token in run] for run in plain_runs(routes, layer)]
        tokens = [one for run in runs for one in run]
        total = sum(map(len, tokens))
        if found.locality is None:
            assert total == 0
            continue
        longest = max(map(len, runs)) - 1
        assert found.locality.distances.tolist() == powers_up_to(longest)
        for d, lag, reuse, window in zip(
            found.locality.distances,
            found.locality.lags,
            found.locality.reuse_within,
            found.locality.distinct_in_window,
            strict=True,
        ):
            pairs = [(run[t], run[t - d]) for run in runs for t in range(d, len(run))]
            own = sum(len(a) for a, _ in pairs)
            same(lag, sum(len(a & b) for a, b in pairs) / own if own else math.nan)
            before = [(run[t], set().union(*run[max(0, t - d) : t])) for run in runs for t in range(len(run))]
            same(reuse, sum(len(a & b) for a, b in before) / total)
            whole = [set().union(*run[t : t + d]) for run in runs for t in range(len(run) - d + 1)]
            same(window, sum(map(len, whole)) / len(whole) if whole else math.nan)
        load = Counter(e for one in tokens for e in one)
        same(found.locality.by_chance, total / len(tokens) / found.num_experts)
        same(found.locality.by_load, sum(n * n for n in load.values()) / len(tokens) / total)
        same(found.locality.fixed_coverage, covered(load, found.num_experts))


def powers_up_to(longest: int) -> list[int]:
    """1, 2, 4, ... to the first that reaches as far back as any token has tokens before it."""
    found = [1] if longest else []
    while found and found[-1] < longest:
        found.append(2 * found[-1])
    return found


def covered(load: Counter[int], experts: int) -> list[float]:
    most = sorted((load[e] for e in range(experts)), reverse=True)
    return [sum(most[: c + 1]) / sum(most) for c in range(experts)]


@some
@given(drawn_routes(), st.integers(1, 5))
def test_segments_are_covered_by_their_own_best_experts(routes: RecordedRoutes, length: int) -> None:
    from moe_trace.read.routes.locality import locality
    from moe_trace.read.routes.tokens import TokenOrder, layer_tokens

    order = TokenOrder.of(routes)
    for layer in range(len(routes.layers)):
        found = locality(layer_tokens(routes, order, layer), segments=(length,))
        curves = []
        for run in plain_runs(routes, layer):
            for start in range(0, len(run) - length + 1, length):
                load = Counter(e for token in run[start : start + length] for e in token["experts"])
                if load:
                    curves.append(covered(load, routes.num_experts[layer]))
        if found is not None:
            same(found.segment_coverage[0], np.mean(curves, axis=0) if curves else math.nan)


@some
@given(drawn_routes(layers=2))
def test_transitions_are_asked_on_tokens_that_they_were_not_counted_on(routes: RecordedRoutes) -> None:
    found = study([routes]).layers[0].transition
    assert found is not None
    first, second = ({t["row"]: t for t in plain_tokens(routes, layer)} for layer in (0, 1))
    rows = [row for row in by_sequence(routes) if row in first and row in second]
    paths = [(first[row]["experts"], second[row]["experts"]) for row in rows]
    counted, used, load = Counter(), Counter(), Counter()
    half = len(paths) // 2
    for a, b in paths[:half]:
        counted.update(itertools.product(a, b))
        used.update(a)
        load.update(b)
    experts, k = routes.num_experts[1], routes.top_k[1]
    hits, hits_by_load = 0, 0
    for a, b in paths[half:] if half else []:
        score = [sum(counted[i, j] / used[i] for i in a if used[i]) for j in range(experts)]
        hits += len(set(sorted(range(experts), key=lambda j: (-score[j], j))[:k]) & set(b))
        hits_by_load += len(set(sorted(range(experts), key=lambda j: (-load[j], j))[:k]) & set(b))
    total = sum(len(b) for _, b in paths[half:]) if half else 0
    same(found.recall, hits / total if total else math.nan)
    same(found.recall_by_load, hits_by_load / total if total else math.nan)
    everywhere = Counter(pair for a, b in paths for pair in itertools.product(a, b))
    here = Counter(i for a, _ in paths for i in a)
    expected = [
        [everywhere[i, j] / here[i] if here[i] else math.nan for j in range(experts)]
        for i in range(routes.num_experts[0])
    ]
    same(found.probability, expected)


def by_sequence(routes: RecordedRoutes) -> list[int]:
    """Rows, sequence after sequence; those of an unknown place last."""
    known = (routes.sequence >= 0) & (routes.position >= 0)
    return sorted(range(len(routes)), key=lambda r: (not known[r], routes.sequence[r] if known[r] else 0, r))


@some
@given(drawn_routes())
def test_distinct_experts_of_recorded_decode_steps(routes: RecordedRoutes) -> None:
    for layer, found in enumerate(study([routes]).layers):
        steps: dict[int, list[set[int]]] = {}
        for token in plain_tokens(routes, layer):
            if token["stage"] == "decode":
                steps.setdefault(token["forward"], []).append(set(token["experts"]))
        sizes = sorted({len(step) for step in steps.values()})
        assert found.distinct.batch_sizes.tolist() == sizes
        for size, number, mean in zip(sizes, found.distinct.steps, found.distinct.measured, strict=True):
            unions = [len(set().union(*step)) for step in steps.values() if len(step) == size]
            assert number == len(unions)
            same(mean, sum(unions) / len(unions))


@some
@given(st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=7))
def test_distinct_experts_of_drawn_tokens_are_the_mean_over_all_draws(tokens: list[set[int]]) -> None:
    counts = np.array([sum(e in one for one in tokens) for e in range(6)])
    for batch, found in enumerate(drawn_distinct(counts, len(tokens), BATCH_MAX), start=1):
        draws = [len(set().union(*draw)) for draw in itertools.combinations(tokens, batch)]
        same(found, sum(draws) / len(draws))


@some
@given(drawn_routes())
def test_gates(routes: RecordedRoutes) -> None:
    for layer, found in enumerate(study([routes]).layers):
        tokens = [t for t in plain_tokens(routes, layer) if t["experts"]]
        if routes.weights is None or not tokens:
            assert found.gates is None
            continue
        assert found.gates is not None
        chosen = [
            [(e, w) for e, w in zip(t["slots"], t["weights"], strict=True) if e is not None] for t in tokens
        ]
        mass = [sum(w for one in chosen for e, w in one if e == i) for i in range(found.num_experts)]
        if sum(mass):
            np.testing.assert_allclose(found.gates.mass_share, np.array(mass) / sum(mass), rtol=1e-5)
        number = [sum(e == i for one in chosen for e, _ in one) for i in range(found.num_experts)]
        same(found.gates.assignment_share, np.array(number) / sum(number))
        weights = [sorted(w for _, w in one) for one in chosen if len(one) > 1]
        if weights:
            margins = [w[-1] - w[-2] for w in weights]
            np.testing.assert_allclose(found.gates.margin, np.quantile(margins, QUANTILES), atol=1e-6)
            np.testing.assert_allclose(found.gates.margin_mean, np.mean(margins), atol=1e-6)
            last = [w[0] / sum(w) for w in weights if sum(w)]
            if len(last) == len(weights):
                np.testing.assert_allclose(found.gates.last, np.quantile(last, QUANTILES), atol=1e-6)
        else:
            assert np.isnan(found.gates.margin).all()


@some
@given(drawn_routes(), st.integers(0, 2**32 - 1))
def test_vocabulary_of_input_target_and_predicted_ids(routes: RecordedRoutes, seed: int) -> None:
    guesses = np.random.default_rng(seed).integers(-1, 3, len(routes))
    for layer, found in enumerate(study([routes], predicted=[guesses]).layers):
        tokens = plain_tokens(routes, layer)
        known = {
            "input": [(t["token_id"], t) for t in tokens],
            "target": [
                (b["token_id"], a) for run in unbroken_runs(routes) for a, b in itertools.pairwise(run)
            ],
            "predicted": [(int(guesses[t["row"]]), t) for t in tokens],
        }
        rows = {t["row"]: t for t in tokens}
        for kind, pairs in known.items():
            seen: dict[int, list[list[int | None]]] = {}
            for number, token in pairs:
                if number >= 0 and token["row"] in rows:
                    seen.setdefault(number, []).append(rows[token["row"]]["slots"])
            if not seen:
                assert kind not in found.vocabulary
                continue
            means = [
                max(sum(e in slots for slots in many) / len(many) for e in range(found.num_experts))
                for many in seen.values()
            ]
            first = [
                max(sum(e == slots[0] for slots in many) / len(many) for e in range(found.num_experts))
                for many in seen.values()
            ]
            vocabulary = found.vocabulary[kind]
            assert vocabulary.ids == len(seen)
            same(vocabulary.mean, np.mean(means))
            same(vocabulary.mean_first, np.mean(first))
            often = [m for m, many in zip(means, seen.values(), strict=True) if len(many) >= 10]
            same(vocabulary.mean_often, np.mean(often) if often else math.nan)
            assert vocabulary.favourites.sum() == sum(m > 0 for m in often)
            same(np.nansum(vocabulary.by_expert * vocabulary.favourites), sum(often))


def unbroken_runs(routes: RecordedRoutes) -> list[list[dict[str, Any]]]:
    """Runs of the tokens themselves: the next token is known even where a layer's call was lost."""
    return plain_runs(replace(routes, lost_layers=None), 0)


@some
@given(drawn_routes(lost=False), st.data())
def test_domains(routes: RecordedRoutes, data: Any) -> None:
    cut = data.draw(st.integers(0, len(routes)))
    parts = [routes[:cut], routes[cut:]]
    found = study(parts, ["code", "prose"])
    if found.saturation is not None:  # two equal halves are the same tokens
        return
    for layer, one in enumerate(found.layers):
        assert one.domains is not None
        for domain, part in enumerate(parts):
            tokens = plain_tokens(part, layer)
            assert one.domains.tokens[domain] == len(tokens)
            with_e = [sum(e in t["experts"] for t in tokens) for e in range(one.num_experts)]
            same(one.domains.share[domain], np.array(with_e) / len(tokens) if tokens else math.nan)
        assert one.domains.uniform == one.top_k / one.num_experts


def test_sequences_of_two_files_do_not_follow_each_other() -> None:
    first = decoded_routes([[0, 1], [1, 2]], position=[0, 1])
    second = decoded_routes([[2, 3], [0, 3]], position=[2, 3])
    together = study([first, second]).layers[0].locality
    assert together is not None
    assert together.consecutive == (1 + 1) / 4


@some
@given(drawn_routes(lost=False), st.integers(0, 2**32 - 1))
def test_saturation_is_against_the_last_checkpoint(routes: RecordedRoutes, seed: int) -> None:
    random = np.random.default_rng(seed)
    early = routes.expert_ids.copy()
    for layer, (experts, k) in enumerate(zip(routes.num_experts, routes.top_k, strict=True)):
        for token in range(len(routes)):
            if random.random() < 0.5:
                early[token, layer, :k] = random.choice(experts, k, replace=False)
    found = study([replace(routes, expert_ids=early), routes], ["1 %", "end"]).saturation
    assert found is not None
    for layer, k in enumerate(routes.top_k):
        overlaps, equal = [], 0
        for row in range(len(routes)):
            a, b = (x[row, layer, :k].tolist() for x in (early, routes.expert_ids))
            a_set, b_set = (set(x) - {routes.no_expert} for x in (a, b))
            if not routes.padding[row] and not recomputed(routes, row) and (a_set or b_set):
                overlaps.append(len(a_set & b_set) / max(len(a_set), len(b_set)))
                equal += a[0] == b[0] != routes.no_expert
        same(found.top_k[0, layer], sum(overlaps) / len(overlaps) if overlaps else math.nan)
        same(found.top_1[0, layer], equal / len(overlaps) if overlaps else math.nan)


def recomputed(routes: RecordedRoutes, row: int) -> bool:
    return routes.recomputed is not None and bool(routes.recomputed[row])


@some
@given(drawn_routes(lost=False), st.integers(0, 2**32 - 1))
def test_saturation_is_the_overlap_that_a_comparison_tells(routes: RecordedRoutes, seed: int) -> None:
    early = replace(routes, expert_ids=np.random.default_rng(seed).permutation(routes.expert_ids))
    found = study([early, routes], ["1 %", "end"]).saturation
    kept = ~routes.padding if routes.recomputed is None else ~routes.padding & ~routes.recomputed
    if (
        found is None
        or not kept.any()
        or len(set(zip(routes.sequence, routes.position, strict=True))) < len(routes)
    ):
        assume(False)  # nothing to compare, or tokens that a comparison cannot tell apart
    compared = compare_routes(early[kept], routes[kept])
    assert np.allclose(found.top_k[0], compared.overlap, equal_nan=True)


def test_real_counts_give_the_load_that_their_samples_give() -> None:
    """OLMoE-1B-7B's published counts, dealt to tokens of eight different experts each."""
    recorded = json.loads((DATA / "olmoe_expert_counts.json").read_text())
    counts = np.array(recorded["counts"]["c4"])
    tokens = counts.sum(axis=1)[0] // 8
    ids = np.empty((tokens, len(counts), 8), np.uint8)
    for layer, counts_E in enumerate(counts):
        assert counts_E.sum() == 8 * tokens
        ids[:, layer] = np.repeat(np.arange(64, dtype=np.uint8), counts_E).reshape(8, tokens).T
    zeros = np.zeros(tokens, np.int64)
    routes = RecordedRoutes(
        expert_ids=ids,
        layers=("0", "7", "15"),
        num_experts=(64,) * 3,
        top_k=(8,) * 3,
        padding=zeros == np.arange(tokens) % 3,
        step=zeros,
        forward=zeros,
        sequence=zeros.astype(np.int32) - 1,
        position=zeros.astype(np.int32) - 1,
        stage_codes=zeros.astype(np.uint8),
    )
    for found, counts_E in zip(study([routes]).layers, counts, strict=True):
        assert found.load == describe_load(counts_E)
        assert found.locality is None, "nobody told which token follows which"


def test_layers_of_another_number_of_tokens_are_studied_apart() -> None:
    text, picture = decoded_routes([[0, 1]] * 3, [0, 1, 2]), decoded_routes([[2, 3]] * 5, [0, 1, 2, 3, 4])
    found = study([replace(text, others=(picture,))])
    assert (found.rows, [other.rows for other in found.others]) == (3, [5])
    assert found.others[0].layers[0].counts.tolist() == [0, 0, 5, 5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ["a", "b"]}, "a label for each of 1 files; found 2"),
        ({"predicted": [np.zeros(2)]}, "one predicted token id for each row"),
    ],
)
def test_what_does_not_match_is_refused(change: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        study([decoded_routes([[0, 1]], [0])], **change)


def test_files_of_other_models_are_refused() -> None:
    one = decoded_routes([[0, 1]], [0])
    with pytest.raises(UsageError, match="b has other layers"):
        study([one, replace(one, layers=("other",))], ["a", "b"])
    with pytest.raises(UsageError, match="at least one"):
        study([])
