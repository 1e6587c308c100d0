"""Hypothesis strategies for routes, including missing and unusual data, with equivalent plain lists."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from moe_trace.data.calls.sample import STAGES
from moe_trace.data.routes.columns import RecordedRoutes


@st.composite
def drawn_routes(draw: Any, *, lost: bool = True, layers: int | None = None) -> RecordedRoutes:
    """Up to 40 tokens of up to 3 sequences; some experts are far more likely than others."""
    tokens = draw(st.integers(0, 40))
    count = layers or draw(st.integers(1, 3))
    experts = [draw(st.sampled_from([4, 6, 9, 70])) for _ in range(count)]
    top_k = [draw(st.integers(1, 4)) for _ in range(count)]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from([np.uint8, np.uint16]))
    none = np.iinfo(kind).max
    ids = np.full((tokens, count, max(top_k)), none, kind)
    for layer in range(count):
        popular = random.dirichlet(np.full(experts[layer], 0.3)) + 1e-6
        for token in range(tokens):
            chosen = random.choice(experts[layer], top_k[layer], replace=False, p=popular / popular.sum())
            ids[token, layer, : top_k[layer]] = chosen
    ids[random.random(ids.shape) < draw(st.sampled_from([0, 0.2]))] = none
    lost_layers = random.random((tokens, count)) < 0.1 if lost and draw(st.booleans()) else None
    if lost_layers is not None:
        ids[lost_layers] = none
    sequence, position = _places(random, tokens, draw(st.integers(1, 3)), draw(st.booleans()))
    weights = random.random(ids.shape).astype(np.float16) if draw(st.booleans()) else None
    return RecordedRoutes(
        expert_ids=ids,
        layers=tuple(f"layers.{i}.gate" for i in range(count)),
        num_experts=tuple(experts),
        top_k=tuple(top_k),
        padding=random.random(tokens) < draw(st.sampled_from([0, 0.2])),
        step=np.zeros(tokens, np.int64),
        forward=np.sort(random.integers(0, max(1, tokens // 2), tokens)),
        sequence=sequence,
        position=position,
        stage_codes=random.integers(0, len(STAGES), tokens).astype(np.uint8),
        recomputed=random.random(tokens) < 0.1 if draw(st.booleans()) else None,
        lost_layers=lost_layers,
        weights=weights,
        token_ids=random.integers(-1, 5, tokens).astype(np.int32) if draw(st.booleans()) else None,
    )


def _places(
    random: np.random.Generator, tokens: int, sequences: int, unknown: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Interleaved sequences, each in order, with gaps, new beginnings, and places that nobody told."""
    sequence = random.integers(0, sequences, tokens).astype(np.int32)
    position = np.zeros(tokens, np.int32)
    at = dict.fromkeys(range(sequences), -1)
    for token, number in enumerate(sequence.tolist()):
        jump = random.random()
        at[number] = 0 if jump < 0.1 else at[number] + (3 if jump < 0.2 else 1)
        position[token] = at[number]
    if unknown:
        position[random.random(tokens) < 0.1] = -1
        sequence[random.random(tokens) < 0.1] = -1
    return sequence, position


Token = dict[str, Any]


def plain_tokens(routes: RecordedRoutes, layer: int) -> list[Token]:
    """The tokens that count in one layer, in the order of the calls: row, experts, place, weights."""
    found = []
    for row in range(len(routes)):
        if routes.padding[row] or (routes.recomputed is not None and routes.recomputed[row]):
            continue
        if routes.lost_layers is not None and routes.lost_layers[row, layer]:
            continue
        slots = routes.expert_ids[row, layer, : routes.top_k[layer]].tolist()
        found.append(
            {
                "row": row,
                "slots": [None if e == routes.no_expert else e for e in slots],
                "experts": [e for e in slots if e != routes.no_expert],
                "sequence": int(routes.sequence[row]),
                "position": int(routes.position[row]),
                "forward": int(routes.forward[row]),
                "stage": STAGES[routes.stage_codes[row]],
                "weights": None
                if routes.weights is None
                else routes.weights[row, layer, : len(slots)].tolist(),
                "token_id": -1 if routes.token_ids is None else int(routes.token_ids[row]),
            }
        )
    return found


def plain_runs(routes: RecordedRoutes, layer: int) -> list[list[Token]]:
    """The same as chains of tokens that follow each other in a sequence; a row that counts but was lost in
    this layer ends a chain."""
    here = {token["row"]: token for token in plain_tokens(routes, layer)}
    runs: list[list[Token]] = []
    for number in sorted(set(routes.sequence.tolist()) - {-1}):
        before = None
        for row in np.flatnonzero(routes.sequence == number).tolist():
            again = routes.recomputed is not None and routes.recomputed[row]
            position = int(routes.position[row])
            if routes.padding[row] or again or position < 0:
                continue
            if row in here:
                if before is not None and position == before + 1:
                    runs[-1].append(here[row])
                else:
                    runs.append([here[row]])
            before = position if row in here else None
    return runs
