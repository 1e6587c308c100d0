"""The graphs launched in a trace, and what one tracer knows of them."""

from __future__ import annotations

from dataclasses import dataclass

from moe_trace.data.schema import Placement, RangeKind, Recording, Span
from moe_trace.timeline.correlate.launches import Launch, Launches, hull
from moe_trace.timeline.correlate.nodes import NodeFinder, NodeSpans
from moe_trace.timeline.correlate.reasons import FUSED, UNKNOWN_NODES


@dataclass(frozen=True)
class TraceClock:
    """From the host's clock to the trace's."""

    base_time_ns: int
    window: Span | None

    def time_us(self, time_ns: int) -> float:
        """On the trace's clock."""
        return (time_ns - self.base_time_ns) / 1000

    def covers(self, time_ns: int) -> bool:
        """Whether the trace was being recorded then."""
        if self.window is None:
            return True
        return self.window.start_us <= self.time_us(time_ns) <= self.window.end_us


Found = Placement | str
"""Or why there is no placement."""


class Replays:
    """The launches of a trace, and what one tracer knows of their graphs."""

    def __init__(self, recording: Recording, launches: Launches, clock: TraceClock) -> None:
        self.recording, self.launches, self.clock = recording, launches, clock
        self.nodes = NodeFinder(recording, launches.graphs)

    def placement(self, launch: Launch, name: str) -> Placement:
        """Of the router of that path, at its launch."""
        spans: dict[RangeKind, NodeSpans] = self.nodes.of(launch).get(name, {})
        device: dict[RangeKind, Span] = {kind: found.span for kind, found in spans.items()}
        whole = hull(item.span for item in launch.work)
        if whole is not None:
            device["graph"] = whole
        return Placement(
            host={"graph": launch.span},
            device=device,
            busy_us={kind: found.busy_us for kind, found in spans.items()},
        )

    def why_untimed(self, placement: Placement) -> str:
        """Why a router has no time of its own."""
        captured = self.recording.captured_graphs
        problems = [graph.problem for graph in captured if graph.problem is not None]
        if problems:
            return problems[0]
        return UNKNOWN_NODES if captured and "graph" in placement.device else FUSED
