"""`simulate`: hit rates and bytes moved, by policy, memory and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from moe_trace.data.errors import UsageError
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.cache.belady import belady_hits
from moe_trace.read.routes.cache.prefetch import Prefetch, prefetch
from moe_trace.read.routes.cache.requests import Requests, Together, requests_of
from moe_trace.read.routes.cache.stack import Stack, StackPolicy
from moe_trace.read.routes.sets import total_size

Policy = Literal["lru", "lfu", "static", "belady"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheResult:
    """Of one policy and one size of memory."""

    policy: Policy
    experts_in_memory: int
    """Experts of each layer, or `layers` times as many of all layers in one memory."""
    requests: Ints
    """[L] experts that steps needed."""
    hits: Ints
    """[L] those that were in memory."""
    tokens: int
    expert_bytes: int | None
    prefetch: Prefetch | None = None

    @property
    def hit_rate(self) -> float:
        """Hits over requests, of all layers; NaN where nothing was needed."""
        return float(self.hits.sum() / self.requests.sum()) if self.requests.sum() else float("nan")

    @property
    def layer_hit_rates(self) -> npt.NDArray[np.float64]:
        """[L] the same of each layer."""
        return np.where(self.requests > 0, self.hits / np.maximum(self.requests, 1), np.nan)

    @property
    def loads_per_token(self) -> float:
        """Experts loaded for each token, all layers together."""
        return float((self.requests - self.hits).sum() / self.tokens) if self.tokens else float("nan")

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes moved for each token; None where the size of an expert is unknown."""
        return None if self.expert_bytes is None else self.loads_per_token * self.expert_bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheStudy:
    """All policies and sizes, of one group of layers."""

    layers: tuple[str, ...]
    together: Together
    shared: bool
    """Whether all layers share one memory."""
    steps: int
    """Steps that were simulated: the first ones."""
    steps_recorded: int
    tokens: int
    """Tokens of the simulated steps."""
    expert_bytes: int | None
    results: tuple[CacheResult, ...]
    curves: dict[str, npt.NDArray[np.float64]]
    """LRU, LFU, static -> [E] hit rate for 1, 2, ... experts in memory (of each layer, or in all)."""


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
    """Simulate a memory of experts, for the first group of layers.

    Args:
        experts_in_memory: experts of each layer that fit; where `shared`, L times as many of all layers.
        together: what needs its experts at once: a `"forward"`, or each `"token"`, as if decoded alone.
        prefetch_by: `"transition"`: also say what loading ahead for the next layer gives (see `Prefetch`).
        expert_bytes: bytes of one expert's weights, to say bytes beside experts.
        most_steps: simulate the first so many steps; of a shared memory each layer's turn is a step.

    Raises:
        UsageError: an unknown policy, sizes below 1, or prefetching into a shared memory.
    """
    _check(experts_in_memory, policies, shared, prefetch_by, expert_bytes)
    if most_steps is not None and shared:
        most_steps = max(1, most_steps // max(1, len(routes.layers)))
    needed = requests_of(routes, together, most_steps)
    run = _Run(needed, routes.top_k, tuple(experts_in_memory), shared, expert_bytes)
    results, curves = run.simulated(policies if needed.steps else (), prefetch_by is not None)
    return CacheStudy(
        layers=routes.layers,
        together=together,
        shared=shared,
        steps=needed.steps,
        steps_recorded=needed.steps_recorded,
        tokens=needed.tokens,
        expert_bytes=expert_bytes,
        results=results,
        curves=curves,
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


@dataclass(frozen=True, eq=False)
class _Run:
    """What all policies are simulated on."""

    needed: Requests
    top_k: tuple[int, ...]
    sizes: tuple[int, ...]
    shared: bool
    expert_bytes: int | None

    @property
    def _memories(self) -> Requests:
        return self.needed.in_one_memory() if self.shared else self.needed

    def simulated(
        self, policies: Sequence[Policy], fetch: bool
    ) -> tuple[tuple[CacheResult, ...], dict[str, npt.NDArray[np.float64]]]:
        """The results of every policy and size, and the curves of those that have one."""
        results: list[CacheResult] = []
        curves: dict[str, npt.NDArray[np.float64]] = {}
        for policy in policies:
            if policy == "belady":
                results += self.best()
            else:
                curves[policy], found = self.stacked(policy, fetch)
                results += found
        return tuple(results), curves

    def stacked(self, policy: StackPolicy, fetch: bool) -> tuple[npt.NDArray[np.float64], list[CacheResult]]:
        """Hit rates for every size, and the results for those asked for."""
        memories, layers = self._memories, len(self.needed.sets)
        wide = max(64 * sets.shape[1] for sets in memories.sets)
        hits_LC = np.zeros((layers, wide + 1), np.int64)
        for memory, sets in enumerate(memories.sets):
            stack = Stack(policy, sets, memories.experts[memory])
            for steps, _, places in stack.places():
                layer = steps % layers if self.shared else memory
                places = np.where(places < stack.wide, places, wide)
                np.add(
                    hits_LC,
                    np.bincount(layer * (wide + 1) + places, minlength=hits_LC.size).reshape(hits_LC.shape),
                    out=hits_LC,
                )
        up_to = np.cumsum(hits_LC[:, :-1], axis=1)
        fetched = prefetch(policy, self.needed, self.top_k, self.sizes) if fetch else [None] * len(self.sizes)
        results = [
            self._result(policy, size, up_to[:, min(self._held(size), wide) - 1], ahead)
            for size, ahead in zip(self.sizes, fetched, strict=True)
        ]
        most = sum(self.needed.experts) if self.shared else max(self.needed.experts)
        return up_to.sum(axis=0)[:most] / max(1, hits_LC.sum()), results

    def best(self) -> list[CacheResult]:
        """Belady's."""
        memories, layers = self._memories, len(self.needed.sets)
        hits = np.zeros((layers, len(self.sizes), len(memories.sets)), np.int64)
        for step, found in enumerate(belady_hits(memories.sets, [self._held(size) for size in self.sizes])):
            hits[step % layers if self.shared else 0] += found
        hits_CL = hits[:, :, 0].T if self.shared else hits[0]
        return [
            self._result("belady", size, hits_L) for size, hits_L in zip(self.sizes, hits_CL, strict=True)
        ]

    def _held(self, size: int) -> int:
        return size * len(self.needed.sets) if self.shared else size

    def _result(self, policy: Policy, size: int, hits_L: Ints, ahead: Prefetch | None = None) -> CacheResult:
        return CacheResult(
            policy=policy,
            experts_in_memory=size,
            requests=np.array([total_size(sets) for sets in self.needed.sets]),
            hits=hits_L,
            tokens=self.needed.tokens,
            expert_bytes=self.expert_bytes,
            prefetch=ahead,
        )
