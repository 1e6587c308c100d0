"""Experts that each step requests in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.sets import Ints, Words, expert_sets

Together = Literal["forward", "token"]


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests of steps, in the order of the calls."""

    sets: tuple[Words, ...]
    """[S, W] experts that each step needs, by layer."""
    experts: tuple[int, ...]
    """Number of experts of each layer."""
    tokens: int
    """Number of tokens in these steps."""
    steps_recorded: int
    """Number of steps in the file; S may be fewer."""

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return len(self.sets[0]) if self.sets else 0

    def in_one_memory(self) -> Requests:
        """Join all layers into one memory with a step for each layer, one after the other.

        Expert e of layer l is number 64 * (words of the layers before l) + e.
        """
        words = [sets.shape[1] for sets in self.sets]
        joined = np.zeros((self.steps, len(words), sum(words)), np.uint64)
        for layer, sets in enumerate(self.sets):
            first = sum(words[:layer])
            joined[:, layer, first : first + words[layer]] = sets
        flat = joined.reshape(self.steps * len(words), -1)
        return Requests((flat,), (64 * sum(words),), self.tokens, self.steps_recorded)


def requests_of(
    routes: RecordedRoutes, together: Together, most_steps: int | None, turns: int = 1
) -> Requests:
    """Return the first `most_steps` // `turns` steps of a group of layers, or all if `most_steps` is None."""
    rows = np.flatnonzero(routes.counted)
    if together == "forward":
        rows = rows[np.argsort(routes.forward[rows], kind="stable")]
        forward = routes.forward[rows]
        starts = np.flatnonzero(np.diff(forward, prepend=forward[:1] - 1))
    else:
        starts = np.arange(len(rows))
    recorded = len(starts)
    max_forwards = recorded if most_steps is None else max(1, most_steps // max(1, turns))
    if recorded > max_forwards:
        rows, starts = rows[: starts[max_forwards]], starts[:max_forwards]
    return Requests(
        tuple(_needed(routes, layer, rows, starts) for layer in range(len(routes.layers))),
        routes.num_experts,
        len(rows),
        recorded,
    )


def _needed(routes: RecordedRoutes, layer: int, rows: Ints, starts: Ints) -> Words:
    experts = routes.num_experts[layer]
    ids = routes.expert_ids[rows, layer, : routes.top_k[layer]]
    sets = expert_sets(ids, experts)
    if len(starts) == len(rows):
        return sets
    return np.bitwise_or.reduceat(sets, starts, axis=0) if len(starts) else sets
