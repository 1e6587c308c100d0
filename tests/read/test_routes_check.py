"""Tests that `check_routes` finds planted faults at their place, and none in real routes."""

from __future__ import annotations

import json
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
from moe_trace.read.routes.check import RULES, check_routes
from tiny_routes import routes_of


def captured(ids: np.ndarray, experts: int, **columns: Any) -> RecordedRoutes:
    """As other tools capture them: whose tokens they are is unknown."""
    unknown = np.full(len(ids), -1, np.int32)
    return routes_of(ids, experts, **{"sequence": unknown, "position": unknown, **columns})


def routed(
    tokens: int, layers: int = 4, slots: int = 2, experts: int = 8, *, seed: int = 0, skew: float = 1.0
) -> RecordedRoutes:
    """What routers choose for states that follow each other, some tokens being repeated."""
    rng = np.random.default_rng(seed)
    words = rng.standard_normal((20, 16))
    text = np.repeat(rng.integers(0, 20, tokens), rng.integers(1, 4, tokens))[:tokens]
    state, context = np.zeros((tokens, 16)), np.zeros(16)
    for row, word in enumerate(text):
        context = 0.8 * context + 0.6 * words[word]
        state[row] = words[word] + context + 0.3 * rng.standard_normal(16)
    ids = np.empty((tokens, layers, slots), np.uint8)
    for layer in range(layers):
        logits = state @ rng.standard_normal((16, experts)) + skew * rng.standard_normal(experts)
        ids[:, layer] = np.argsort(-logits, axis=1)[:, :slots]
    return captured(ids, experts)


def broken(routes: RecordedRoutes, reference: RecordedRoutes | None = None) -> dict[str, list[Any]]:
    return {rule: found for rule, found in check_routes(routes, reference).items() if found}


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 400),
    layers=st.integers(1, 6),
    slots=st.integers(1, 4),
    experts=st.sampled_from([4, 8, 16, 60]),
    seed=st.integers(0, 10_000),
    skew=st.sampled_from([0.0, 1.0, 2.0]),
)
def test_what_routers_choose_is_never_broken(**shape: Any) -> None:
    assert broken(routed(**shape)) == {}


@pytest.mark.parametrize("rows", [[17], [5, 6, 90], range(40, 200), range(1, 200)])
def test_stale_rows_are_found_where_they_are(rows: Any) -> None:
    routes = routed(200, layers=8, slots=4, experts=32)
    for row in rows:
        routes.expert_ids[row] = routes.expert_ids[row - 1]
    if len(rows) < 199:
        found = broken(routes)["rows_are_their_own"]
        assert [p.count for p in found] == [len(rows)] and found[0].first == f"row {rows[0]}, step 0"
    else:
        assert len(broken(routes)["layers_route"]) == 8


def test_a_stale_row_of_decoding_is_that_of_its_own_sequence() -> None:
    routes = routed(200, layers=8, slots=4, experts=32)
    step, sequence = np.divmod(np.arange(200), 4)
    placed = replace(routes, sequence=sequence.astype(np.int32), position=step.astype(np.int32))
    placed.expert_ids[120] = placed.expert_ids[116]
    found = broken(placed)["rows_are_their_own"]
    assert [(p.count, p.first) for p in found] == [(1, "row 120, step 0, sequence 0, position 30")]
    placed.expert_ids[121] = placed.expert_ids[120]  # of another sequence: may be the same prompt
    assert broken(placed)["rows_are_their_own"][0].count == 1


def test_a_token_that_follows_itself_may_repeat_its_row() -> None:
    routes = routed(200, layers=8, slots=4, experts=32)
    routes.expert_ids[50:60] = routes.expert_ids[49]
    ids = np.arange(200, dtype=np.int32)
    assert broken(replace(routes, token_ids=ids))["rows_are_their_own"][0].count == 10
    ids[50:60] = ids[49]
    assert broken(replace(routes, token_ids=ids)) == {}


def test_equal_tokens_at_the_start_may_have_equal_rows() -> None:
    routes = replace(routed(100, layers=8, slots=4, experts=32), sequence=np.zeros(100, np.int32))
    placed = replace(routes, position=np.arange(100, dtype=np.int32))
    placed.expert_ids[1] = placed.expert_ids[0]
    assert broken(placed) == {}


def test_ids_out_of_range_and_beyond_top_k_are_found() -> None:
    routes = routed(100, experts=8)
    routes.expert_ids[30, 1, 0] = 8
    routes.expert_ids[31, 1, 0] = routes.no_expert
    routes.expert_ids[[70, 80], 3, 1] = 200
    found = broken(routes)
    assert found.keys() == {"ids_are_in_range"}
    assert [(p.layer, p.count, p.first.split(",")[0]) for p in found["ids_are_in_range"]] == [
        ("layers.1.gate", 1, "row 30"),
        ("layers.3.gate", 2, "row 70"),
    ]
    narrow = replace(routed(100), top_k=(2, 2, 1, 2))
    assert [p.layer for p in broken(narrow)["slots_are_within_top_k"]] == ["layers.2.gate"]


def test_an_expert_twice_in_a_token_is_found_and_two_empty_slots_are_not() -> None:
    routes = routed(100, slots=3)
    routes.expert_ids[10, 2] = routes.no_expert
    assert broken(routes) == {}
    routes.expert_ids[20, 2, 2] = routes.expert_ids[20, 2, 0]
    found = broken(routes)
    assert found.keys() == {"experts_of_a_token_differ"}
    assert [(p.layer, p.count) for p in found["experts_of_a_token_differ"]] == [("layers.2.gate", 1)]


@pytest.mark.parametrize("slots", [1, 2])
def test_a_dense_layer_of_zeros_is_found(slots: int) -> None:
    routes = routed(100, slots=slots)
    routes.expert_ids[:, 1] = 0
    found = broken(routes)
    assert found.keys() == {"layers_route"}
    assert [(p.layer, p.count) for p in found["layers_route"]] == [("layers.1.gate", 100)]


def test_a_layer_with_anothers_rows_is_found() -> None:
    routes = routed(100)
    routes.expert_ids[:, 3] = routes.expert_ids[:, 1]
    found = broken(routes)["layers_are_their_own"]
    assert [(p.layer, p.count) for p in found] == [("layers.3.gate", 100)] and "layers.1.gate" in found[
        0
    ].message


@pytest.mark.parametrize("fill", [[0, 0, 0], [0, 1, 2]])
def test_padding_with_real_ids_is_found(fill: list[int]) -> None:
    routes = routed(100, layers=6, slots=3, experts=16)
    routes.expert_ids[90:] = fill
    found = broken(routes)
    assert [p.count for p in found["padding_is_marked"]] == [10]
    assert found["padding_is_marked"][0].first.startswith("row 90,")
    padding = np.arange(100) >= 90
    assert broken(replace(routes, padding=padding)).keys() <= {"experts_of_a_token_differ"}
    imported = replace(routes, padding=padding, model={"captured_by": "vLLM"})
    assert [p.count for p in broken(imported)["padding_is_marked"]] == [10]


@pytest.mark.parametrize("offset", [1, -1, 2])
def test_an_offset_of_layers_is_found_against_a_reference(offset: int) -> None:
    reference = routed(300, layers=6, slots=3, experts=16)
    moved = replace(reference, expert_ids=np.roll(reference.expert_ids, offset, axis=1))
    assert broken(reference, reference) == {}
    found = broken(moved, reference)["layers_stand_in_their_place"]
    assert len(found) == 6 and f"an offset of {-offset:+d} layers" in {
        p.message.split(": ")[1] for p in found
    }
    with pytest.raises(UsageError, match="same tokens"):
        check_routes(moved[:200], reference)


def test_the_command_says_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = routed(100), routed(100, seed=1)
    bad.expert_ids[30, 1, 0] = 99
    paths = [str(good.save(tmp_path / "good.routes.npz")), str(bad.save(tmp_path / "bad.routes.npz"))]
    assert main(["routes", "check", paths[0]]) == 0
    text = capsys.readouterr().out
    assert text.count("  ok  ") == len(RULES) and "BROKEN" not in text
    assert main(["routes", "check", *paths, "--reference", paths[0]]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "layers.1.gate: 1 of 100 tokens, first row 30, step 0: an id that is none of the layer's 8" in text
    assert main(["routes", "check", *paths, str(tmp_path / "none"), "--format", "json"]) == 1
    plain = json.loads(capsys.readouterr().out)
    assert [p["count"] for p in plain[paths[1]]["ids_are_in_range"]] == [1]
    assert plain[str(tmp_path / "none")]["file_can_be_read"][0]["message"]
    assert main(["routes", "check", str(tmp_path / "none")]) == 5


def test_a_file_that_was_not_closed_is_checked_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = routed(100).save(tmp_path / "a.routes.npz")
    path.write_bytes(path.read_bytes()[:-30])
    assert main(["routes", "check", str(path)]) == 0
    assert "not closed" in capsys.readouterr().err
