"""Launches of CUDA graphs in a trace with their device work, joined by correlation.

Read only if there are calls inside graphs to place. Like `scan.py`, this searches the bytes and parses only
matching events.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moe_trace.data.schema import GRAPH_LAUNCH, Span
from moe_trace.data.trace_json import windows
from moe_trace.data.trace_json.windows import EventBytes, Window
from moe_trace.timeline.correlate.scan import decode_event

_HOST_NAMES = re.compile(rb'"(?:cudaGraphLaunch|cudaMemcpyAsync)"')
# Writers of decisions outside a graph: Inductor's own kernels, launched by the driver, or torch's scatter.
_OTHER_WRITERS = re.compile(rb'"cuLaunchKernel|index_put_kernel')
_SCATTER = "index_put"  # in the names of Inductor's and of torch's own kernels
_CORRELATION = re.compile(rb'"correlation"\s*:\s*(\d+)')
_KERNELS = frozenset({"kernel", "concurrent_kernel"})
_WORK = _KERNELS | {"gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class DeviceWork:
    """A kernel, copy or memset."""

    kernel: str | None
    """Input of `graph_digest`; None for a copy or memset."""
    span: Span
    stream: tuple[Any, Any]
    """Process and thread in the trace, which are the device and its stream."""
    node_id: int
    """The `graph node id` that newer profilers write; 0 if there is none."""
    name: str = ""

    @property
    def scatters(self) -> bool:
        """Whether it scatters into a tensor, as every write to a ring buffer does."""
        return _SCATTER in self.name


@dataclass(frozen=True)
class Launch:
    """A runtime call on the host, and its device work in order of time."""

    name: str
    span: Span
    tid: Any
    correlation: int
    work: list[DeviceWork] = field(default_factory=list)

    @property
    def is_graph(self) -> bool:
        return self.name == GRAPH_LAUNCH

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its work."""
        return tuple(item.name for item in self.work)

    @property
    def scatters(self) -> bool:
        """Whether it can have written a decision."""
        return any(item.scatters for item in self.work)

    @property
    def streams(self) -> set[tuple[Any, Any]]:
        return {item.stream for item in self.work}


@dataclass(frozen=True)
class Launches:
    """Launches of graphs and other writers in a trace, by host time."""

    graphs: list[Launch]
    copies: list[Launch]
    """Copies, including those made by moe_trace's marks."""
    driver_launches: list[tuple[Any, float]]
    """Thread and time (us) of kernels launched by compiled code outside graphs."""
    scatters_us: list[float]
    """Start times on the device of scatters outside graphs."""

    def written_beside(self, host: Span, device: Span, thread: Any = None) -> bool:
        """Return whether anything launched outside graphs, by one thread or any, can have written a
        decision."""
        launched = [time_us for tid, time_us in self.driver_launches if thread in (None, tid)]
        return any(host.holds(time_us) for time_us in launched) or any(map(device.holds, self.scatters_us))


def hull(spans: Iterable[Span]) -> Span | None:
    """Return first start to last end; None without spans."""
    found = list(spans)
    if len(found) < 2:
        return found[0] if found else None
    start = min(span.start_us for span in found)
    # Sums of start and duration are rounded to the nanoseconds of the clock.
    return Span(start, round(max(span.end_us for span in found) - start, 3))


def read_launches(events: EventBytes) -> Launches:
    """Return all graph launches of the trace with their work, and its copies, including those of marks."""
    by_correlation = {
        launch.correlation: launch
        for event in _events_at(events, _HOST_NAMES)
        if (launch := _launch(event)) is not None
    }
    table = Launches([], [], [], [])
    if not any(launch.is_graph for launch in by_correlation.values()):
        return table
    for event in _events_at(events, _CORRELATION, frozenset(by_correlation)):
        work = _device_work(event)
        if work is not None:
            by_correlation[event["args"]["correlation"]].work.append(work)
    for launch in sorted(by_correlation.values(), key=lambda launch: launch.span.start_us):
        launch.work.sort(key=lambda item: item.span.start_us)
        (table.graphs if launch.is_graph else table.copies).append(launch)
    _add_other_writers(events, table, frozenset(launch.correlation for launch in table.graphs))
    return table


def _add_other_writers(events: EventBytes, table: Launches, graphs: frozenset[int]) -> None:
    for event in _events_at(events, _OTHER_WRITERS):
        if event.get("cat") == "cuda_driver":
            table.driver_launches.append((event.get("tid"), float(event["ts"])))
        elif event.get("cat") in _WORK and event["args"].get("correlation") not in graphs:
            table.scatters_us.append(float(event["ts"]))


def _events_at(
    events: EventBytes, pattern: re.Pattern[bytes], wanted: frozenset[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the event around each match; with `wanted`, only of these numbers."""
    for window in events.windows():
        for match in pattern.finditer(window.buffer, window.since, window.filled):
            if match.start() >= window.until:
                break
            if wanted is None or int(match.group(1)) in wanted:
                event = _event_around(window, match.start())
                if event is not None:
                    yield event


def _event_around(window: Window, position: int) -> dict[str, Any] | None:
    """Decode the event around a position, which Kineto starts with `ph`; kernel names may contain braces."""
    buffer = window.buffer
    phase = buffer.rfind(b'"ph"', max(0, position - windows.EVENT_MAX), position)
    start = buffer.rfind(b"{", max(0, phase - 64), phase) if phase >= 0 else -1
    event = decode_event(buffer, start, window.filled) if start >= 0 else None
    return event if event is not None and isinstance(event.get("args"), dict) else None


def _launch(event: dict[str, Any]) -> Launch | None:
    correlation = event["args"].get("correlation")
    if event.get("ph") != "X" or event.get("cat") != "cuda_runtime" or not isinstance(correlation, int):
        return None
    return Launch(str(event.get("name")), _span(event), event.get("tid"), correlation)


def _device_work(event: dict[str, Any]) -> DeviceWork | None:
    category, args = event.get("cat"), event["args"]
    if category not in _WORK or event.get("ph") != "X":
        return None
    grid, block = (",".join(map(str, args.get(name) or ())) for name in ("grid", "block"))
    kernel = f"{grid} {block}" if category in _KERNELS else None
    node_id = args.get("graph node id")
    stream = (event.get("pid"), event.get("tid"))
    return DeviceWork(
        kernel,
        _span(event),
        stream,
        node_id if isinstance(node_id, int) else 0,
        str(event.get("name")),
    )


def _span(event: dict[str, Any]) -> Span:
    return Span(float(event["ts"]), float(event.get("dur", 0.0)))
