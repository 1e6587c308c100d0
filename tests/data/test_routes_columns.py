"""The columns of recorded routes: their shapes are checked, parts of a run are joined, counts are theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_trace import RecordedRoutes, Routes
from moe_trace.data.errors import UsageError
from moe_trace.data.routes.columns import UNKNOWN, concatenate, id_type
from tiny_routes import random_routes


def some_routes(tokens: int = 5, *, layers: int = 2, seed: int = 0) -> RecordedRoutes:
    return random_routes(tokens, layers=layers, slots=2, experts=4, seed=seed)


def test_assignments_are_what_the_ids_add_up_to_and_skipped_slots_are_none() -> None:
    routes = some_routes()
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
    first, second = some_routes(seed=1), some_routes(3, seed=2)
    second = replace(second, token_ids=np.arange(3, dtype=np.int32), dropped={"max_mib": 4})
    joined = concatenate([first, second])
    assert np.array_equal(joined.expert_ids, np.concatenate([first.expert_ids, second.expert_ids]))
    assert joined.token_ids is not None and joined.token_ids.tolist() == [UNKNOWN] * 5 + [0, 1, 2]
    assert joined.weights is None and joined.dropped == {"max_mib": 4}
    assert np.array_equal(joined[5:].expert_ids, second.expert_ids)


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected position of shape \(5,\); found \(4,\)"):
        replace(some_routes(), position=np.arange(4))
    with pytest.raises(ValueError, match="same layers"):
        concatenate([some_routes(), some_routes(layers=3)])


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="every=0"):
        Routes(every=0)
    with pytest.raises(UsageError, match="keep='oldest'"):
        Routes(keep="oldest")  # type: ignore[arg-type]
