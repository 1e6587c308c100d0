"""The band of calls that share one place: all layers of a compiled forward, or of one replay of a graph.

One slice a replay, and counters whose names say that they stand for all its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.placements import Side
from moe_trace.data.calls.table import CallTable
from moe_trace.data.load_stats import Load, describe_load
from moe_trace.data.schema import Placement, RangeKind, RoutingSample, Span, moe_span

REPLAY_NAME = "graph"


@dataclass(frozen=True)
class PlacedCall:
    """A placed sample with what its events need."""

    sample: RoutingSample
    load: Load
    spans: dict[RangeKind, Span]
    """Device spans where the call has any, else host spans."""
    clock: Literal["device", "host"]
    experts_are_split: bool = False
    """See `Recording.experts_are_split`."""

    @property
    def moe(self) -> Span:
        """The whole MoE layer: its block, or from the router to the end of the experts."""
        return moe_span(self.spans)

    @property
    def of_layer(self) -> bool:
        """Whether it has a place of its own, rather than only one shared with its graph's other layers."""
        return "router" in self.spans or "block" in self.spans


def placed_call(sample: RoutingSample, *, experts_are_split: bool = False) -> PlacedCall:
    """A sample that has a placement, on the device's clock where it has spans there."""
    assert sample.placement is not None
    spans, clock = spans_of(sample.placement)
    return PlacedCall(sample, describe_load(sample.assignments), spans, clock, experts_are_split)


def spans_of(placement: Placement) -> tuple[dict[RangeKind, Span], Literal["device", "host"]]:
    """What the band draws."""
    device = placement.device
    if "router" in device or "block" in device or (placement.in_graph and "graph" in device):
        return device, "device"
    return placement.host, "host"


def experts_range_us(calls: CallTable) -> npt.NDArray[np.float64]:
    """[N] duration of each call's experts, dispatch, combine and gaps included; NaN where they have no place.

    On the clock that the band draws (`spans_of`).
    """

    def there(side: Side, kind: RangeKind) -> npt.NDArray[np.bool_]:
        return ~np.isnan(calls.duration_us(side, kind))

    in_graph = there("host", "graph") & there("device", "graph")
    on_device = there("device", "router") | there("device", "block") | in_graph
    device, host = (calls.duration_us(side, "experts") for side in ("device", "host"))
    return np.where(on_device, device, host)


@dataclass(frozen=True)
class Replay:
    """The calls of one forward, by layer."""

    calls: tuple[PlacedCall, ...]

    @property
    def span(self) -> Span:
        return self.calls[0].spans["graph"]


def find_replays(calls: Iterable[PlacedCall]) -> list[Replay]:
    """Calls with the same graph or forward, in order of time."""
    groups: dict[Any, list[PlacedCall]] = {}
    for call in calls:
        if "graph" in call.spans:
            assert call.sample.placement is not None
            host = call.sample.placement.host["graph"]
            groups.setdefault((call.sample.thread, host, call.spans["graph"]), []).append(call)
    replays = [Replay(tuple(sorted(group, key=lambda c: c.sample.layer))) for group in groups.values()]
    return sorted(replays, key=lambda replay: replay.span.start_us)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _worst_load(replay: Replay) -> float | None:
    return max((c.load.max_over_mean for c in replay.calls if c.load.max_over_mean is not None), default=None)


REPLAY_FIGURES: dict[str, Callable[[Replay], float | None]] = {
    "load max÷mean (graph: worst layer)": _worst_load,
    "load max÷mean (graph: mean)": lambda replay: _mean(c.load.max_over_mean for c in replay.calls),
    "router entropy (nats) (graph: mean)": lambda replay: _mean(
        c.sample.router_entropy for c in replay.calls
    ),
    "active experts (graph: mean)": lambda replay: _mean(c.load.active_experts for c in replay.calls),
}


def replay_args(replay: Replay) -> dict[str, Any]:
    """What a click on a replay shows: a line a layer."""
    first = replay.calls[0]
    return {
        "in graph": True,
        "clock": first.clock,
        "step": first.sample.step,
        "stage": first.sample.stage,
        "layers": len(replay.calls),
        **{name: figure(replay) for name, figure in REPLAY_FIGURES.items()},
        **{call.sample.site: _line(call) for call in replay.calls},
    }


def _line(call: PlacedCall) -> str:
    sample, load = call.sample, call.load
    parts = [f"{sample.tokens} tokens", f"{sum(sample.assignments.tolist())} assignments"]
    if load.max_over_mean is not None:
        parts.append(f"load max÷mean {load.max_over_mean:.2f}")
    parts.append(f"{load.active_experts} active experts")
    if sample.router_entropy is not None:
        parts.append(f"entropy {sample.router_entropy:.3f} nats")
    return ", ".join(parts)
