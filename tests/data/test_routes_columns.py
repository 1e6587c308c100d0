"""The columns of recorded routes: their shapes are checked, parts of a run are joined, counts are theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_trace import RecordedRoutes, Routes
from moe_trace.data.errors import UsageError
from moe_trace.data.routes.columns import UNKNOWN, concatenate, id_type


def routes_of(
    tokens: int = 5, layers: int = 2, slots: int = 2, experts: int = 4, seed: int = 0
) -> RecordedRoutes:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, experts, (tokens, layers, slots)).astype(id_type(experts))
    return RecordedRoutes(
        expert_ids=ids,
        layers=tuple(f"layers.{i}.gate" for i in range(layers)),
        num_experts=(experts,) * layers,
        top_k=(slots,) * layers,
        padding=np.zeros(tokens, bool),
        step=np.zeros(tokens, np.int64),
        forward=np.zeros(tokens, np.int64),
        sequence=np.zeros(tokens, np.int32),
        position=np.arange(tokens, dtype=np.int32),
        stage_codes=np.zeros(tokens, np.uint8),
    )


def test_assignments_are_what_the_ids_add_up_to_and_skipped_slots_are_none() -> None:
    routes = routes_of()
    routes.expert_ids[0, 0, 1] = routes.no_expert
    counts = routes.assignments()
    for layer in range(2):
        for expert in range(4):
            assert counts[layer, expert] == (routes.expert_ids[:, layer] == expert).sum()
    assert routes.skipped.sum() == 1 and counts.sum() == 5 * 2 * 2 - 1
    assert set(routes.stage) == {"train"} or set(routes.stage) == {"prefill"}


def test_an_id_type_has_room_for_no_expert() -> None:
    assert [id_type(n) for n in (8, 255, 256)] == [np.uint8, np.uint8, np.uint16]


def test_parts_are_joined_with_what_only_some_of_them_have() -> None:
    first, second = routes_of(seed=1), routes_of(3, seed=2)
    second = replace(second, token_ids=np.arange(3, dtype=np.int32), dropped={"max_mib": 4})
    joined = concatenate([first, second])
    assert np.array_equal(joined.expert_ids, np.concatenate([first.expert_ids, second.expert_ids]))
    assert joined.token_ids is not None and joined.token_ids.tolist() == [UNKNOWN] * 5 + [0, 1, 2]
    assert joined.weights is None and joined.dropped == {"max_mib": 4}
    assert np.array_equal(joined[5:].expert_ids, second.expert_ids)


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected position of shape \(5,\); found \(4,\)"):
        replace(routes_of(), position=np.arange(4))
    with pytest.raises(ValueError, match="same layers"):
        concatenate([routes_of(), routes_of(layers=3)])


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="every=0"):
        Routes(every=0)
    with pytest.raises(UsageError, match="keep='oldest'"):
        Routes(keep="oldest")  # type: ignore[arg-type]
