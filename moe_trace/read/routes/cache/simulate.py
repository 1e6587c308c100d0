"""Simulate a cache of experts: hit rates and bytes moved, by policy, memory size and layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from moe_trace.data.errors import UsageError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.cache.belady import belady_hits
from moe_trace.read.routes.cache.prefetch import Prefetch, prefetch
from moe_trace.read.routes.cache.requests import Requests, Together, requests_of
from moe_trace.read.routes.cache.stack import StackPolicy, places
from moe_trace.read.routes.sets import Floats, Ints, total_size
from moe_trace.read.time.peaks import item_bytes

Policy = Literal["lru", "lfu", "static", "belady"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheResult:
    """Result for one policy and one memory size."""

    policy: Policy
    experts_in_memory: int
    """Number of experts per layer, or, in a shared memory, 1 / L of its size."""
    requests: Ints
    """[L] number of experts that steps needed."""
    hits: Ints
    """[L] number of requests that were in memory."""
    tokens: int
    expert_bytes: int | None
    prefetch: Prefetch | None = None

    @property
    def hit_rate(self) -> float:
        """Hits over requests of all layers; NaN without requests."""
        return float(self.hits.sum() / self.requests.sum()) if self.requests.sum() else float("nan")

    @property
    def layer_hit_rates(self) -> Floats:
        """Hits over requests of each layer, [L]; NaN without requests."""
        return np.where(self.requests > 0, self.hits / np.maximum(self.requests, 1), np.nan)

    @property
    def loads_per_token(self) -> float:
        """Experts loaded per token, in all layers together."""
        return float((self.requests - self.hits).sum() / self.tokens) if self.tokens else float("nan")

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes moved per token, or None if the size of an expert is unknown."""
        return None if self.expert_bytes is None else self.loads_per_token * self.expert_bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheStudy:
    """Results for all policies and sizes, for one group of layers."""

    layers: tuple[str, ...]
    together: Together
    shared: bool
    """Whether all layers share one memory."""
    steps: int
    """Number of simulated steps, from the first."""
    steps_recorded: int
    tokens: int
    """Number of tokens in the simulated steps."""
    expert_bytes: int | None
    results: tuple[CacheResult, ...]
    curves: dict[str, Floats]
    """Hit rate for 1, 2, ... experts in memory (per layer or in total), [E], for LRU, LFU and static."""


def simulate(
    routes: RecordedRoutes,
    experts_in_memory: Sequence[int],
    policies: Sequence[Policy] = POLICIES,
    *,
    shared: bool = False,
    together: Together = "forward",
    prefetch_by: Literal["transition"] | None = None,
    expert_bytes: int | None = None,
    most_steps: int | None = None,
) -> CacheStudy:
    """Simulate a memory of experts for the first group of layers.

    Args:
        experts_in_memory: Experts of each layer that fit; if `shared`, L times as many of all layers.
        together: Unit that needs its experts at once: a `"forward"`, or each `"token"`, as if decoded alone.
        prefetch_by: `"transition"` also evaluates loading ahead for the next layer (see `Prefetch`).
        expert_bytes: Bytes of one expert's weights, to also report bytes.
        most_steps: Number of steps to simulate; with a shared memory each layer's turn is a step.

    Raises:
        UsageError: The policy is unknown, a size is below 1, or a shared memory is to be prefetched into.
    """
    _check(experts_in_memory, policies, shared, prefetch_by, expert_bytes)
    needed = requests_of(routes, together, most_steps, turns=len(routes.layers) if shared else 1)
    found = [
        _simulate_policy(policy, needed, routes.top_k, experts_in_memory, shared, prefetch_by, expert_bytes)
        for policy in (policies if needed.steps else ())
    ]
    return CacheStudy(
        layers=routes.layers,
        together=together,
        shared=shared,
        steps=needed.steps,
        steps_recorded=needed.steps_recorded,
        tokens=needed.tokens,
        expert_bytes=expert_bytes,
        results=tuple(result for results, _ in found for result in results),
        curves={results[0].policy: curve for results, curve in found if curve is not None},
    )


def _check(
    sizes_C: Sequence[int],
    policies: Sequence[str],
    shared: bool,
    prefetch_by: str | None,
    expert_bytes: int | None,
) -> None:
    unknown = [policy for policy in policies if policy not in POLICIES]
    if unknown or not policies:
        found = f"policy {unknown[0]!r}" if unknown else "no policy"
        raise UsageError(f"found {found}, expected one of {', '.join(POLICIES)}")
    if not sizes_C or min(sizes_C) < 1:
        raise UsageError(f"found {list(sizes_C)} experts in memory, expected numbers from 1 on")
    if prefetch_by not in (None, "transition"):
        raise UsageError(f"found prefetching by {prefetch_by!r}, expected 'transition'")
    if prefetch_by is not None and shared:
        raise UsageError("prefetching is simulated for a memory of each layer; leave out sharing, or it")
    if expert_bytes is not None and expert_bytes < 1:
        raise UsageError(f"found an expert of {expert_bytes} bytes, expected a number above 0")


def _simulate_policy(
    policy: Policy,
    needed: Requests,
    top_k: Sequence[int],
    sizes: Sequence[int],
    shared: bool,
    prefetch_by: str | None,
    expert_bytes: int | None,
) -> tuple[list[CacheResult], Floats | None]:
    """Return the results by size, and the hit rate for every size if the policy is a stack algorithm."""
    layers, memories = len(needed.sets), needed.in_one_memory() if shared else needed
    capacities = [size * layers if shared else size for size in sizes]
    curve, fetched = None, list[Prefetch | None]([None] * len(sizes))
    if policy == "belady":
        hits_LC = _belady(memories, capacities, layers)
    else:
        kept_LC, requests = _hits_by_capacity(policy, memories, layers)
        hits_LC = kept_LC[:, np.minimum(capacities, kept_LC.shape[1]) - 1]
        max_size = sum(needed.experts) if shared else max(needed.experts)
        curve = kept_LC.sum(axis=0)[:max_size] / max(1, requests)
        fetched = [*prefetch(policy, needed, top_k, sizes)] if prefetch_by else fetched
    results = [
        CacheResult(
            policy=policy,
            experts_in_memory=size,
            requests=np.array([total_size(sets) for sets in needed.sets]),
            hits=hits_L,
            tokens=needed.tokens,
            expert_bytes=expert_bytes,
            prefetch=ahead,
        )
        for size, hits_L, ahead in zip(sizes, hits_LC.T, fetched, strict=True)
    ]
    return results, curve


def _hits_by_capacity(policy: StackPolicy, memories: Requests, layers: int) -> tuple[Ints, int]:
    """Return the hits of each layer where 1, 2, ... C experts fit, [L, C], and the number of all requests."""
    width = max(64 * sets.shape[1] for sets in memories.sets)
    hits_LC = np.zeros((layers, width + 1), np.int64)
    for memory, sets in enumerate(memories.sets):
        for steps, _, found in places(policy, sets):
            layer = np.asarray(memory if len(memories.sets) == layers else steps % layers)
            np.add.at(hits_LC, (layer, np.where(found < 64 * sets.shape[1], found, width)), 1)
    return np.cumsum(hits_LC[:, :-1], axis=1), int(hits_LC.sum())


def _belady(memories: Requests, held: Sequence[int], layers: int) -> Ints:
    """Return the hits of each layer by memory size, [L, C]."""
    hits_LC = np.zeros((layers, len(held)), np.int64)
    for step, found_CG in enumerate(belady_hits(memories.sets, held)):
        if len(memories.sets) == layers:
            hits_LC += found_CG.T
        else:
            hits_LC[step % layers] += found_CG[:, 0]
    return hits_LC


def expert_bytes_of(model: Mapping[str, Any]) -> int | None:
    """Return the bytes of gate, up and down projections: 3 * hidden * intermediate * bytes of a number.

    Biases are left out. None if the sizes or the dtype are not recorded, or the weights are quantised.

    Args:
        model: `RecordedRoutes.model`, with `dtype` and the `config` of transformers.
    """
    config = model.get("config")
    if not isinstance(config, Mapping) or any(str(key).startswith("quantization") for key in config):
        return None
    if str(model.get("dtype")).startswith("float8"):  # their scales are not recorded
        return None
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    sizes: list[Any] = [config.get("hidden_size"), inner, item_bytes(model)]
    known = all(isinstance(size, int) and 0 < size < 1 << 31 for size in sizes)
    return 3 * math.prod(sizes) if known else None
