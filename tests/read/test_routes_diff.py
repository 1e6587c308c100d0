"""Tests of `compare_routes` against a plain loop over tokens."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace import RecordedRoutes
from moe_trace.cli import main
from moe_trace.data.errors import UsageError
from moe_trace.read.routes.compare.comparison import compare_routes
from tiny_routes import random_routes


def other_of(routes: RecordedRoutes, seed: int, share: float) -> RecordedRoutes:
    """Some tokens routed anew, some reordered, some slots skipped, in some layers."""
    rng = np.random.default_rng(seed)
    ids = routes.expert_ids.copy()
    tokens, layers, slots = ids.shape
    anew = random_routes(tokens, layers=layers, slots=slots, experts=routes.num_experts[0], seed=seed + 1)
    chosen = rng.random((tokens, layers))
    ids[chosen < share] = anew.expert_ids[chosen < share]
    ids[chosen > 1 - share] = ids[chosen > 1 - share][:, ::-1]
    ids[rng.random(ids.shape) < share / 10] = routes.no_expert
    return replace(routes, expert_ids=ids)


def weighed(routes: RecordedRoutes, seed: int) -> RecordedRoutes:
    weights = np.random.default_rng(seed).random(routes.expert_ids.shape).astype(np.float16)
    return replace(routes, weights=weights)


def brute(a: RecordedRoutes, b: RecordedRoutes) -> dict[str, Any]:
    """The definitions, one token at a time."""
    none, pairs = a.no_expert, []
    for row in range(len(a)):
        if a.padding[row]:
            continue
        for layer in range(len(a.layers)):
            one, two = a.expert_ids[row, layer].tolist(), b.expert_ids[row, layer].tolist()
            sets = set(one) - {none}, set(two) - {none}
            if not sets[0] | sets[1]:
                continue
            size = max(map(len, sets))
            same = sum(x == y != none for x, y in zip(one, two, strict=True)) / size
            pair = {"row": row, "layer": layer, "overlap": len(sets[0] & sets[1]) / size, "same": same}
            pair |= {"differs": sets[0] != sets[1], "moved": same < 1}
            if a.weights is not None and b.weights is not None:
                given_a, given_b = (
                    {e: float(w) for e, w in zip(ids, r.weights[row, layer], strict=True) if e != none}
                    for ids, r in ((one, a), (two, b))
                )
                pair["l1"] = sum(abs(given_a.get(e, 0) - given_b.get(e, 0)) for e in sets[0] | sets[1])
                high = sorted(given_a.values())[::-1]
                pair["margin"] = high[0] - high[1] if len(high) > 1 else None
            pairs.append(pair)
    return {"pairs": pairs, "tokens": [row for row in range(len(a)) if not a.padding[row]]}


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 60),
    layers=st.integers(1, 4),
    slots=st.integers(1, 4),
    experts=st.sampled_from([4, 9, 70]),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    weights=st.booleans(),
)
def test_every_figure_is_that_of_plain_lines(
    tokens: int, layers: int, slots: int, experts: int, seed: int, share: float, weights: bool
) -> None:
    padding = np.random.default_rng(seed).random(tokens) < 0.2
    padding[0] = False
    a = random_routes(tokens, layers=layers, slots=slots, experts=experts, seed=seed, padding=padding)
    b = other_of(a, seed + 1, share)
    if weights:
        a, b = weighed(a, seed + 2), weighed(b, seed + 3)
    found, truth = compare_routes(a, b), brute(a, b)
    assert found.tokens == len(truth["tokens"]) and found.only_a == found.only_b == 0
    first: dict[int, int] = {}
    for pair in truth["pairs"]:
        if pair["differs"]:
            first.setdefault(pair["row"], pair["layer"])
    for layer in range(layers):
        own = [pair for pair in truth["pairs"] if pair["layer"] == layer]
        expected = {
            "overlap": mean([p["overlap"] for p in own]),
            "same_rank": mean([p["same"] for p in own]),
            "differs": mean([p["differs"] for p in own]),
            "reordered": mean([p["moved"] and not p["differs"] for p in own]),
            "begins": sum(begin == layer for begin in first.values()) / found.tokens,
        }
        if weights:
            expected["weights_l1"] = mean([p["l1"] for p in own])
            for name, differs in (("margin_differing", True), ("margin_same", False)):
                told = [p["margin"] for p in own if p["differs"] is differs and p["margin"] is not None]
                expected[name] = mean(told)
        assert found.compared[layer] == len(own)
        for name, value in expected.items():
            assert getattr(found, name)[layer] == pytest.approx(value, nan_ok=True, rel=1e-5), name
    assert found.differing == pytest.approx(len(first) / found.tokens)
    moved = {p["row"] for p in truth["pairs"] if p["moved"]}
    assert found.identical == pytest.approx(1 - len(moved) / found.tokens)
    assert found.drift_begins == (min(first.values()) if first else None)
    assert sum(p.tokens for p in found.positions) == found.tokens
    for part in found.positions:
        rows = [row for row in truth["tokens"] if part.first <= a.position[row] <= part.last]
        assert part.tokens == len(rows)
        assert part.differing == pytest.approx(mean([row in first for row in rows]))
        for layer in range(layers):
            own = [p["overlap"] for p in truth["pairs"] if p["layer"] == layer and p["row"] in rows]
            assert part.overlap[layer] == pytest.approx(mean(own), nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_tokens_are_matched_by_sequence_and_position_in_any_order(lengths: list[int], seed: int) -> None:
    """One forward of padded sequences, against prefill and decoding, and the batch run twice."""
    sequence = np.concatenate([np.full(n, i) for i, n in enumerate(lengths)] * 2).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in lengths] * 2).astype(np.int32)
    a = random_routes(len(sequence), seed=seed, sequence=sequence, position=position)
    half = len(a) // 2
    order = np.argsort(position[:half], kind="stable")
    b = a[np.concatenate([order, half + order])]
    found = compare_routes(a, b)
    assert found.overlap.tolist() == [1.0] * 4 and found.identical == 1 and found.tokens == len(a)


def test_what_one_side_lacks_is_counted() -> None:
    a = random_routes(20)
    found = compare_routes(a, a[:15])
    assert (found.tokens, found.only_a, found.only_b, found.identical) == (15, 5, 0, 1)


def test_other_tokens_are_refused() -> None:
    a = random_routes(20, token_ids=np.arange(20, dtype=np.int32))
    unplaced = {"sequence": np.full(20, -1, np.int32), "position": np.full(20, -1, np.int32)}
    shifted = np.arange(20, dtype=np.int32)
    shifted[7] = 99
    for b, words in (
        (replace(a, token_ids=shifted), "other token ids in 1 of 20 .*row 7 "),
        (replace(a, position=a.position + 100), "0 tokens of the same sequence and position"),
        (replace(a, **unplaced)[:19], "20 tokens and 19"),
        (random_routes(20, layers=3), None),
        (random_routes(20, experts=8), "8 experts"),
        (replace(random_routes(20, layers=3), layers=("x", "y", "z")), "of other names"),
    ):
        if words is None:
            assert len(compare_routes(a, b).layers) == 3
            continue
        with pytest.raises(UsageError, match=words):
            compare_routes(a, b)
    by_order = compare_routes(a, replace(a, **unplaced, token_ids=None))
    assert by_order.aligned_by == "the order of the rows alone" and by_order.identical == 1


def test_lost_layers_and_recomputed_tokens_are_left_out() -> None:
    a = random_routes(20)
    b = replace(a, expert_ids=a.expert_ids.copy(), lost_layers=np.zeros((20, 4), bool))
    b.expert_ids[3, 1] = b.no_expert
    assert b.lost_layers is not None
    b.lost_layers[3, 1] = True
    found = compare_routes(a, b)
    assert found.compared.tolist() == [20, 19, 20, 20] and found.differing == 0
    again = replace(a[np.arange(40) % 20], recomputed=np.arange(40) >= 20)
    assert compare_routes(again, a).tokens == 20


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = weighed(random_routes(200), 1)
    b = weighed(other_of(a, 5, 0.1), 2)
    paths = [str(r.save(tmp_path / f"{n}.routes.npz")) for n, r in (("a", a), ("b", b))]
    truth = compare_routes(a, b)
    assert main(["routes", "diff", *paths]) == 0
    text = capsys.readouterr().out
    assert f"{100 * truth.differing:.1f} %" in text and "L03" in text and "weights L1" in text
    assert main(["routes", "diff", *paths, "--format", "json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["layers"][2]["overlap"] == pytest.approx(truth.overlap[2])
    assert plain["positions"][0]["tokens"] == 1 and plain["differing"] == truth.differing
    assert main(["routes", "diff", *paths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plain
    assert main(["routes", "diff", paths[0], paths[0]]) == 0
    assert "no token" in capsys.readouterr().out


def test_several_files_are_held_against_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = random_routes(300)
    steps = [other_of(last, 5, share) for share in (0.5, 0.1)] + [last]
    paths = [str(r.save(tmp_path / f"step{i}.routes.npz")) for i, r in enumerate(steps)]
    assert main(["routes", "diff", *paths, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    for step, saturation in zip(steps[:-1], plain["saturation"], strict=True):
        for layer in range(4):
            one, two = step.expert_ids[:, layer], last.expert_ids[:, layer]
            shared = [
                len(set(x) & set(y) - {255}) / 2 for x, y in zip(one.tolist(), two.tolist(), strict=True)
            ]
            assert saturation["overlap"][layer] == pytest.approx(np.mean(shared))
    assert main(["routes", "diff", *paths]) == 0
    assert "step0.routes.npz" in capsys.readouterr().out
    assert main(["routes", "diff", paths[0]]) == 2
