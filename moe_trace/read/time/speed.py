"""Relate work to time: achieved FLOP/s, share of the peak, and whether memory or arithmetic binds.

FLOPs come from the recorder, by formula from the real weights. Bytes are the minimum that must move once: the
weights of the experts that were hit, and each slot's hidden state in and out. The true traffic is larger, so
the arithmetic intensity given here is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moe_trace.data.calls.table import CallTable
from moe_trace.data.display.notebook import ShortRepr
from moe_trace.data.schema import RouterInfo
from moe_trace.read.time.peaks import Peak, item_bytes
from moe_trace.read.time.phase_detection import EXPERTS, ROUTER
from moe_trace.read.time.phases import CallTimes
from moe_trace.timeline.placed_calls import experts_range_us

Bound = Literal["memory", "arithmetic"]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Rate of one part of an MoE layer over forward work, including recomputed calls."""

    flops: int
    work_us: float | None
    """Device busy time of the part's phase, or None if unknown; on a CPU its time in operators."""
    flops_per_s: float | None
    share_of_peak: float | None
    least_bytes: int | None
    """None if the model's dtype or width is unknown."""
    intensity: float | None
    """FLOP per byte, an upper bound."""
    bound: Bound | None
    """Side of the roofline's ridge, or None if the device's peaks are unknown."""
    above_roofline_us: float | None
    """Time beyond what the peaks allow for these FLOPs and bytes, or None if they are unknown."""
    flops_per_s_with_gaps: float | None = None
    """Rate of the experts over the duration of their range, with dispatch, combine and gaps, over all calls.
    The timeline's counter `expert TFLOP/s (with gaps)` shows it call by call."""


_SLOT_FIELDS = ("flops_per_s", "share_of_peak", "least_bytes", "intensity", "bound", "above_roofline_us")


@dataclass(frozen=True, kw_only=True)
class LayerSpeed:
    """Speed of the router and expert products of one layer."""

    site: str
    name: str
    router: Rate
    experts: Rate


@dataclass(frozen=True, kw_only=True, repr=False)
class SpeedReport(ShortRepr):
    """Speeds of all layers, with the peaks that they are compared with."""

    device: str | None
    dtype: str | None
    peak_flops_per_s: float | None
    peak_bytes_per_s: float | None
    layers: tuple[LayerSpeed, ...]
    experts: Rate
    """Rate over all layers."""


def report_speed(
    times: CallTimes,
    routers: Sequence[RouterInfo],
    model: dict[str, Any],
    peak: Peak,
    devices: Sequence[str],
    *,
    experts_are_split: bool = False,
) -> SpeedReport | None:
    """Report speeds, or return None if no call has ranges in the trace.

    Args:
        experts_are_split: See `Recording.experts_are_split`; the experts' work in their time is then
            unknown, and their speed is None.
    """
    if not len(times.samples):
        return None
    dtype = model.get("dtype")
    measure = _Measure(peak, item_bytes(model), _width(model), experts_are_split)
    layers = []
    for router in routers:
        router_times = times.select(times.samples.of_router(router.name))
        if len(router_times.samples):
            layers.append(
                LayerSpeed(
                    site=router.site,
                    name=router.name,
                    router=measure.router(router_times, router),
                    experts=measure.experts(router_times, {router.name: router}),
                )
            )
    return SpeedReport(
        device=devices[0] if devices else None,
        dtype=dtype if isinstance(dtype, str) else None,
        peak_flops_per_s=peak.flops_per_s,
        peak_bytes_per_s=peak.bytes_per_s,
        layers=tuple(layers),
        experts=measure.experts(times, {r.name: r for r in routers}),
    )


def _width(model: dict[str, Any]) -> int | None:
    width = model.get("hidden_size")
    return width if isinstance(width, int) and not isinstance(width, bool) and width > 0 else None


@dataclass(frozen=True, eq=False)
class _Measure:
    peak: Peak
    item_bytes: int | None
    width: int | None
    experts_are_split: bool

    def router(self, times: CallTimes, router: RouterInfo) -> Rate:
        calls = times.samples
        items = None
        if self.width is not None:
            weights = len(calls) * (router.router_flops_per_token // 2)
            items = weights + calls.total("tokens") * (self.width + router.num_experts)
        return self._rate(calls.total("router_flops"), times, ROUTER, items)

    def experts(self, times: CallTimes, routers: dict[str, RouterInfo]) -> Rate:
        calls = times.samples
        items = expert_items(calls, routers, self.width) if self.width is not None else None
        rate = self._rate(calls.total("expert_flops"), times, EXPERTS, items)
        if self.experts_are_split:
            # These depend on the slots that the rank computed, which are not those that its routers assigned.
            return replace(rate, **dict.fromkeys(_SLOT_FIELDS))  # type: ignore[arg-type]
        range_us = experts_range_us(calls)
        known = (range_us > 0) & (calls.expert_flops > 0)
        flops, us = int(calls.expert_flops[known].sum()), float(range_us[known].sum())
        return replace(rate, flops_per_s_with_gaps=1e6 * flops / us if us else None)

    def _rate(self, flops: int, times: CallTimes, phase: int, items: int | None) -> Rate:
        worked = times.work_ns(times.forward)
        work_ns = None if worked is None else int(worked[:, phase].sum())
        per_s = flops / work_ns * 1e9 if work_ns and flops else None
        peak = self.peak
        least = items * self.item_bytes if items is not None and self.item_bytes is not None else None
        bound: Bound | None = None
        above_us = None
        if least and flops and peak.flops_per_s is not None and peak.bytes_per_s is not None:
            bound = "memory" if flops / least < peak.flops_per_s / peak.bytes_per_s else "arithmetic"
            allowed_us = 1e6 * max(flops / peak.flops_per_s, least / peak.bytes_per_s)
            above_us = work_ns / 1000 - allowed_us if work_ns else None
        return Rate(
            flops=flops,
            work_us=None if work_ns is None else work_ns / 1000,
            flops_per_s=per_s,
            share_of_peak=per_s / peak.flops_per_s if per_s and peak.flops_per_s else None,
            least_bytes=least,
            intensity=flops / least if least and flops else None,
            bound=bound,
            above_roofline_us=above_us,
        )


def expert_items(calls: CallTable, routers: dict[str, RouterInfo], width: int) -> int:
    """Count the numbers that the experts' calls must move: weights of experts hit, each slot in and out."""
    hit = np.bincount(calls.router, weights=calls.assignments.used(), minlength=len(calls.keys)).tolist()
    weights = sum(
        int(n) * (routers[key.name].expert_flops_per_slot // 2)
        for key, n in zip(calls.keys, hit, strict=True)
        if n
    )
    return weights + 2 * calls.total("computed_slots") * width
