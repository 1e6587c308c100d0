"""Conversion of blocks to `RecordedRoutes`: groups of layers that saw the same tokens, and their columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes, id_type
from moe_trace.record.routes.blocks import Block


@dataclass(slots=True)
class Layers:
    """The routers whose routes are recorded, with the number of experts and top-k seen in their calls."""

    names: Sequence[str]
    num_experts: list[int]
    top_k: list[int]
    called: set[int] = field(default_factory=set)

    def copy(self) -> Layers:
        """Return a snapshot."""
        return Layers(self.names, list(self.num_experts), list(self.top_k), set(self.called))

    def learn(self, router: int, num_experts: int, top_k: int) -> None:
        """Update a router with the number of experts and slots of a call."""
        self.called.add(router)
        self.num_experts[router] = max(self.num_experts[router], num_experts)
        self.top_k[router] = max(self.top_k[router], top_k)


def as_routes(
    blocks: Sequence[Block], layers: Layers, dropped: Mapping[str, int], run: Mapping[str, Any]
) -> RecordedRoutes:
    """Return the rows of all blocks in call order, with layers that saw other tokens in separate groups.

    Args:
        run: fields of `RecordedRoutes` that are the same for all tokens.
    """
    ordered = sorted(blocks, key=lambda block: block.order)
    groups = [replace(_group(ordered, members, layers), **run) for members in _groups(ordered, layers)]
    groups.sort(key=lambda group: -group.expert_ids.size)
    first, *others = groups
    return replace(first, dropped=dict(dropped), others=tuple(others))


def _groups(blocks: Iterable[Block], layers: Layers) -> list[list[int]]:
    """Group the routers that were called by equal tokens in every forward that they share."""
    forwards: dict[Any, dict[int, set[int]]] = {}
    for block in blocks:
        parts = forwards.setdefault((block.order, id(block.tokens)), {})
        parts.setdefault(hash(block.key), set()).update(block.ids)
    groups = [set(layers.called) or set(range(len(layers.names)))]
    for forward in {tuple(map(frozenset, parts.values())) for parts in forwards.values()}:
        disjoint = _disjoint(forward)
        if len(disjoint) > 1:
            groups = [piece for group in groups for piece in _split(group, disjoint)]
    return [sorted(group) for group in groups]


def _disjoint(parts: Sequence[frozenset[int]]) -> list[set[int]]:
    """Merge the parts of a forward that share a router, which was called on pieces of its tokens."""
    found: list[set[int]] = []
    for part in parts:
        merged = set(part)
        for other in [other for other in found if other & merged]:
            merged |= other
            found.remove(other)
        found.append(merged)
    return found


def _split(group: set[int], apart: Sequence[set[int]]) -> list[set[int]]:
    pieces = [piece for part in apart if (piece := group & part)]
    if len(pieces) < 2:
        return [group]
    rest = group.difference(*pieces)
    max(pieces, key=len).update(rest)
    return pieces


def _group(blocks: Sequence[Block], members: Sequence[int], layers: Layers) -> RecordedRoutes:
    group_blocks = [block for block in blocks if not block.ids.keys().isdisjoint(members)]
    tokens, slots = sum(block.rows for block in group_blocks), max(layers.top_k[router] for router in members)
    kind = id_type(max(layers.num_experts[router] for router in members))
    ids = np.full((tokens, len(members), slots), np.iinfo(kind).max, kind)
    weights = np.full(ids.shape, np.nan, np.float16) if any(block.weights for block in group_blocks) else None
    lost = np.zeros(ids.shape[:2], bool)
    start = 0
    for block in group_blocks:
        rows = slice(start, start := start + block.rows)
        for column, router in enumerate(members):
            found = block.ids.get(router)
            if found is None or router in block.lost:
                lost[rows, column] = True
                continue
            part = ids[rows, column, : found.shape[1]]
            part[...] = found
            if found.dtype != kind:
                part[found == np.iinfo(found.dtype).max] = np.iinfo(kind).max
            if weights is not None and router in block.weights:
                weights[rows, column, : found.shape[1]] = block.weights[router]
    return RecordedRoutes(
        expert_ids=ids,
        layers=tuple(layers.names[router] for router in members),
        num_experts=tuple(layers.num_experts[router] for router in members),
        top_k=tuple(layers.top_k[router] for router in members),
        weights=weights,
        lost_layers=lost if lost.any() else None,
        **_token_columns(group_blocks),
    )


def _token_columns(blocks: Sequence[Block]) -> dict[str, Any]:
    counts = [block.rows for block in blocks]
    identities = [block.identity() for block in blocks]

    def each(values: Iterable[Any], kind: Any) -> np.ndarray:
        return np.repeat(np.array(list(values), kind), counts)

    def joined(name: str, kind: Any) -> np.ndarray:
        columns = (
            identity.get(name, np.full(count, UNKNOWN))
            for identity, count in zip(identities, counts, strict=True)
        )
        return np.concatenate([np.empty(0, kind), *columns], dtype=kind)

    columns = {
        "padding": joined("padding", bool),
        "step": each((block.step for block in blocks), np.int64),
        "forward": each((_number(block) for block in blocks), np.int64),
        "sequence": joined("sequence", np.int32),
        "position": joined("position", np.int32),
        "stage_codes": joined("stage_codes", np.uint8),
    }
    if any(block.recomputed for block in blocks):
        columns["recomputed"] = each((block.recomputed for block in blocks), bool)
    if any("token_ids" in identity for identity in identities):
        columns["token_ids"] = joined("token_ids", np.int32)
    return columns


def _number(block: Block) -> int:
    """Return the 0-based number of a block's forward."""
    host, in_graph = block.order
    return max(0, (in_graph or host) - 1)
