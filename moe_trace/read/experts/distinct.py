"""Number of distinct experts per forward by its number of tokens, and the time to read their weights.

A layer reads the weights of every expert that got a token, including padding, at least once. This is compared
with uniform routing of as many tokens (`uniform_distinct`). A forward is a step of decoding, a prefill, or
both. Forwards of all stages but training count, each with all of its tokens, since prefill and decode tokens
of one forward are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.display.notebook import ShortRepr
from moe_trace.data.distinct import uniform_distinct
from moe_trace.data.schema import Recording, RouterInfo
from moe_trace.read.ranks.loads import RankRecords, held_matrix
from moe_trace.read.time.peaks import item_bytes
from moe_trace.read.time.phase_detection import EXPERTS
from moe_trace.read.time.phases import CallTimes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SIZES_MAX = 10
"""Maximum number of token counts with a row each; more are binned by powers of two."""


@dataclass(frozen=True, kw_only=True)
class DistinctExperts:
    """Statistics of forwards of one size, or of sizes from one power of two to the next."""

    tokens_min: int
    tokens_max: int
    calls: int
    """Number of router calls in all layers, that is forwards times layers."""
    min: int
    median: float
    max: int
    mean: float
    uniform: float
    """Mean under uniform routing of as many tokens, computed per call."""
    experts: float
    """Number of experts E, averaged over the calls."""
    bytes: float | None
    """Bytes of the experts' weights that a forward reads, in the layer or in all layers, averaged over
    forwards. Where ranks hold different experts, this is for the rank that reads most. None if unknown."""
    least_us: float | None
    """Time to read them at the device's memory bandwidth, or None if either is unknown."""
    experts_us: float | None
    """Mean time of the experts in such a forward, or None if the trace lacks it."""

    @property
    def label(self) -> str:
        """Number of tokens, such as `16` or `9-16`."""
        low, high = self.tokens_min, self.tokens_max
        return f"{low:,}" if low == high else f"{low:,}-{high:,}"


@dataclass(frozen=True, kw_only=True)
class LayerDistinct:
    """Distinct experts of one layer."""

    site: str
    name: str
    expert_bytes: int | None
    """Bytes of one expert's weights in a process."""
    sizes: tuple[DistinctExperts, ...]
    """Statistics by size, fewest tokens first."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DistinctReport(ShortRepr):
    """Distinct experts of all layers: statistics over all calls, with bytes and times of a forward summed."""

    sizes: tuple[DistinctExperts, ...]
    layers: tuple[LayerDistinct, ...]
    bytes_per_s: float | None
    """Memory bandwidth of the device."""
    on_device: bool
    """Whether the experts' times were measured on a device."""
    mixed_calls: int
    """Number of calls that both prefill and decode; each counts with all of its tokens."""
    unknown: str | None = None
    """Reason why bytes are unknown."""


def report_distinct(
    recording: Recording, records: RankRecords, times: CallTimes, bytes_per_s: float | None
) -> DistinctReport | None:
    """Report distinct experts, or None if no forward decodes, as a prefill's tokens choose all experts
    anyway.

    Args:
        recording: Recording of all traces together, with each decision once.
        records: Recording of each rank.
    """
    calls = recording.calls
    counted = calls.forward & (calls.stage != "train") & (calls.tokens > 0)
    if not (counted & (calls.stage != "prefill")).any():
        return None
    calls = calls.take(counted)
    columns = _Columns.of(calls, _experts_us(calls, times), _bin_of(calls.tokens), bytes_per_s)
    groups = {records.parallel(rank).expert_ranks for rank in records.ranks}
    experts_are_split = records.exchange == "all_to_all" or len(groups) > 1
    layers = []
    for router in recording.routers:
        rows = np.flatnonzero(calls.of_router(router.name))
        if len(rows):
            expert_bytes = _expert_bytes(router, recording)
            columns.fill(rows, router, None if experts_are_split else expert_bytes, records)
            sizes = columns.sizes(rows)
            layers.append(
                LayerDistinct(site=router.site, name=router.name, expert_bytes=expert_bytes, sizes=sizes)
            )
    sizes = columns.sizes(np.arange(len(calls)))
    return DistinctReport(
        sizes=sizes,
        layers=tuple(layers),
        bytes_per_s=bytes_per_s,
        on_device=times.on_device,
        mixed_calls=int((calls.stage == "mixed").sum()),
        unknown=_why_unknown(sizes, apart=experts_are_split),
    )


def _why_unknown(sizes: Sequence[DistinctExperts], *, apart: bool) -> str | None:
    if apart:
        return "ranks exchange tokens: a rank's experts also compute those of other ranks'"
    if all(size.bytes is None for size in sizes):
        return "the recordings do not tell the size of an expert, or which rank holds it"
    return None


def _expert_bytes(router: RouterInfo, recording: Recording) -> int | None:
    if router.expert_bytes is not None:
        return router.expert_bytes
    number = item_bytes(recording.model)
    if number is None or recording.experts_are_split:
        return None
    return router.expert_flops_per_slot // 2 * number or None  # older files: without biases and scales


def _experts_us(calls: CallTable, times: CallTimes) -> Floats:
    """Return the time of the experts' work in each call, [N], or NaN if unknown."""
    work_ns = times.work_ns(times.forward)
    if work_ns is None:
        return np.full(len(calls), np.nan)
    us = times.us_in(calls)(work_ns[:, EXPERTS])
    return np.where(us > 0, us, np.nan)


def _bin_of(tokens_N: Ints) -> Ints:
    """Return each call's bin, [N]: its number of tokens, rounded up to a power of two if there are many."""
    if len(np.unique(tokens_N)) <= SIZES_MAX:
        return tokens_N
    return 2 ** np.ceil(np.log2(tokens_N)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Columns:
    """Metrics of N calls; NaN if unknown."""

    calls: CallTable
    used: Ints
    uniform: Floats
    experts: Ints
    bytes: Floats
    us: Floats
    bins: Ints
    bytes_per_s: float | None

    @staticmethod
    def of(calls: CallTable, us: Floats, bins: Ints, bytes_per_s: float | None) -> _Columns:
        """Create the columns without values that depend on the router."""
        zeros, unknown = np.zeros((2, len(calls)), np.int64), np.full((2, len(calls)), np.nan)
        return _Columns(calls, zeros[0], unknown[0], zeros[1], unknown[1], us, bins, bytes_per_s)

    def fill(self, rows: Ints, router: RouterInfo, expert_bytes: int | None, records: RankRecords) -> None:
        """Fill in the values that depend on the router."""
        calls = self.calls.take(rows)
        computing = router.num_experts - router.identity_experts
        self.experts[rows] = computing
        self.used[rows] = calls.assignments.used(computing)
        per_token = calls.assignments.totals() / calls.tokens
        share = computing / router.num_experts  # identity experts read nothing
        self.uniform[rows] = share * uniform_distinct(router.num_experts, per_token, calls.tokens)
        if expert_bytes is not None:
            read = _read_by_busiest(self.used[rows], calls, router, records)
            self.bytes[rows] = (
                computing * expert_bytes if router.every_expert_computes else read * expert_bytes
            )

    def sizes(self, rows: Ints) -> tuple[DistinctExperts, ...]:
        bins = self.bins[rows]
        return tuple(self._size(rows[bins == size]) for size in np.unique(bins).tolist())

    def _size(self, rows: Ints) -> DistinctExperts:
        tokens, used = self.calls.tokens[rows], self.used[rows]
        read = self._mean_per_forward(self.bytes, rows)
        return DistinctExperts(
            tokens_min=int(tokens.min()),
            tokens_max=int(tokens.max()),
            calls=len(rows),
            min=int(used.min()),
            median=float(np.median(used)),
            max=int(used.max()),
            mean=float(used.mean()),
            uniform=float(self.uniform[rows].mean()),
            experts=float(self.experts[rows].mean()),
            bytes=read,
            least_us=1e6 * read / self.bytes_per_s if read is not None and self.bytes_per_s else None,
            experts_us=self._mean_per_forward(self.us, rows),
        )

    def _mean_per_forward(self, values: Floats, rows: Ints) -> float | None:
        """Sum each layer's mean over the layers, or return None if a call's value is unknown."""
        router, chosen = self.calls.router[rows], values[rows]
        if np.isnan(chosen).any():
            return None
        calls = np.bincount(router)
        sums = np.bincount(router, weights=chosen)
        return float((sums[calls > 0] / calls[calls > 0]).sum())


def _read_by_busiest(used: Ints, calls: CallTable, router: RouterInfo, records: RankRecords) -> Floats:
    """Return the experts read by the rank that reads most, [N], or NaN if their placement is unknown."""
    group = records.parallel(records.ranks[0]).expert_ranks
    if not group:
        return used.astype(np.float64)
    held_GE = held_matrix(records, router.name, group)
    if held_GE is None:
        return np.full(len(used), np.nan)
    found = np.empty(len(used))
    slots = calls.lists["slot_assignments"]  # each replica that a rank computes with is read
    for i, row in enumerate((slots if slots.known.all() else calls.assignments).rows()):
        chosen = np.zeros(held_GE.shape[1], np.int64)
        if row is not None:
            chosen[: len(row)] = row[: len(chosen)] != 0
        found[i] = (held_GE @ chosen).max()
    return found
