"""Join the kernels launched by compiled graphs in a trace to router calls.

The profiler shows each call of a graph as an operator of Inductor (`## Call CompiledFxGraph`). The calls of a
forward are those inside its range, or the one that contains the launch of its CUDA graph; those of a backward
are joined to their forward's by Kineto's flow between autograd nodes. The launch of each kernel is found by
`timeline/correlate/compiled_launches.py`. On a CPU the kernels are the operators directly inside the call:
those of libraries, and the ranges that Inductor's C++ kernels open if compiled to do so.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.compiled_graph import CompiledGraph, CompiledLaunch, LaunchPart, Place
from moe_trace.data.schema import GRAPH_LAUNCH
from moe_trace.data.trace_json.coverage import Coverage
from moe_trace.data.trace_json.decoding import NO_LINK
from moe_trace.data.trace_json.events import EventTable, Kind, find_links, spans_ns
from moe_trace.data.trace_json.intervals import Intervals, node_intervals, outermost_slices
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.timeline.correlate.compiled_launches import Fit, LaunchMatcher

IntArray = npt.NDArray[np.int64]
CALL = "## Call CompiledFxGraph"
_CPP_RANGE = re.compile(r"^graph_\d+_(?=cpp_)")
"""Prefix of a C++ kernel's name in its range, with `cpp.enable_kernel_profile`."""


@dataclass(frozen=True)
class Work:
    """The part of a kernel that belongs to one router call. `step` orders the launches of a call."""

    call: int
    """Row in the table of calls."""
    step: int
    place: Place
    kernel: int
    """Row in the table of kernels."""
    launch: CompiledLaunch

    @property
    def share(self) -> int:
        """Number of parts of the model that the kernel computes."""
        return len(self.launch.parts) + self.launch.outside


@dataclass(frozen=True)
class _GraphCall:
    """One call of a compiled graph, and the launches of its kernels."""

    fit: Fit
    rows: IntArray
    """Rows of the kernels, in the order of the stream."""


@dataclass(frozen=True)
class _Run:
    """The router calls made by one call of a graph."""

    row_of: Mapping[str, int]
    """Rows of the router calls in its forward, by module path."""
    number: int
    """Index of this run among the graph's `runs` in the forward."""
    runs: int

    def row(self, part: LaunchPart) -> int | None:
        router = part.router(self.number, self.runs, self.row_of)
        return None if router is None else self.row_of[router]


class CompiledCalls:
    """Joins the calls inside compiled code of one trace with their kernels."""

    def __init__(
        self,
        calls: CallTable,
        inside: IntArray,
        graphs: Sequence[CompiledGraph],
        events: EventTable,
        kernels: Kernels,
    ) -> None:
        self.inside, self.kernels = inside, kernels
        """Rows of the calls made inside compiled code that have a place, and the kernels that ran."""
        self.on_device = bool((events.kind == Kind.DEVICE).any())
        """False if `kernels` are operators of the host."""
        self._calls, self._graphs, self._events = calls, graphs, events
        self._ops = compiled_calls(events)
        self._replays = events.select((events.kind == Kind.LAUNCH) & named(events, GRAPH_LAUNCH))
        self._found: dict[int, list[_GraphCall]] = {}
        self._matcher = LaunchMatcher(graphs, self._all_fits, on_device=self.on_device)
        self._runs: dict[int, _Run] = {}
        """Runs by row of `_ops`, for forwards that were joined."""

    def forward(self) -> list[Work]:
        """Return the work of the calls, as far as it can be identified."""
        inside = self.inside
        groups: dict[tuple[float, ...], list[int]] = defaultdict(list)
        spans = self._calls.places.span("host", "graph")[inside].tolist()
        threads = self._calls.thread[inside].tolist()
        for row, thread, span in zip(inside.tolist(), threads, spans, strict=True):
            groups[thread, *span].append(row)
        return [work for rows in groups.values() for work in self._work_of_forward(np.array(rows, np.int64))]

    def backward(self) -> list[Work]:
        """Return the work of the backwards of what `forward` joined."""
        return [
            work
            for op, forward in self._backwards()
            if (found := self._matched(op, self._runs[forward].row_of, backward=True)) is not None
            for work in self._work(found, self._runs[forward], step=0)
        ]

    def cpp_kernels(self) -> Coverage:
        """Return the coverage of graph calls if the lists have C++ kernels: all of them have ranges, or
        none."""
        in_lists = any(
            launch.kernel.startswith("cpp_") for graph in self._graphs for launch in graph.launches
        )
        names = (self._events.names[name] for name in set(self.kernels.name.tolist()))
        in_trace = any(_CPP_RANGE.match(name) for name in names)
        total = len(self._ops) if in_lists else 0
        return Coverage(joined=total if in_trace else 0, total=total)

    def _work_of_forward(self, rows: IntArray) -> Iterator[Work]:
        names = self._calls.name[rows].tolist()
        if len(set(names)) < len(names):  # a router ran twice, so its launches are ambiguous
            return
        row_of = dict(zip(names, rows.tolist(), strict=True))
        ops = self._ops_of(int(rows[0]))
        found = [(op, call) for op in ops if (call := self._matched(op, row_of)) is not None]
        runs, done = Counter(id(call.fit.graph) for _, call in found), Counter[int]()
        step = 0
        for op, call in found:
            graph = id(call.fit.graph)
            self._runs[op] = _Run(row_of, done[graph], runs[graph])
            done[graph] += 1
            yield from self._work(call, self._runs[op], step)
            step += len(self._matcher.launches(call.fit))

    def _work(self, call: _GraphCall, run: _Run, step: int) -> Iterator[Work]:
        """Yield the kernels of a graph call that belong to a router call."""
        for number, (stretch, launch) in enumerate(self._matcher.launches(call.fit)):
            for part in (call.fit.graph.parts[at] for at in launch.parts):
                row = run.row(part)
                if row is not None:
                    for at in stretch.kernels:
                        yield Work(row, step + number, part.place, int(call.rows[at]), launch)

    def _ops_of(self, row: int) -> list[int]:
        """Return the rows of `_ops` in the range of the call's forward, or around the launch that places
        it."""
        start, end = spans_ns(self._calls.places.span("host", "graph")[[row]])[0]
        launched = np.flatnonzero(self._replays.start_ns == start)
        if len(launched):
            threads = set(self._replays.thread[launched].tolist())
        else:
            number = self._calls.thread[row]
            threads = {at for at, (_, thread) in enumerate(self._events.threads) if thread == number}
        begin, stop = self._ops.start_ns, self._ops.end_ns
        holds = ((start <= begin) & (stop <= end)) | ((begin <= start) & (end <= stop))
        return [int(op) for op in np.flatnonzero(holds) if self._ops.thread[op] in threads]

    def _backwards(self) -> Iterator[tuple[int, int]]:
        """Yield (backward, forward) rows of `_ops` whose autograd nodes are joined by a flow."""
        flows = [self._events.select(self._events.kind == kind) for kind in (Kind.FORWARD, Kind.BACKWARD)]
        rows = find_links(flows[1].link, flows[0].link)
        ends, starts = flows[1].select(rows >= 0), flows[0].select(rows[rows >= 0])
        sides = [node_intervals(self._events, side)[0] for side in (ends, starts)] if len(ends) else []
        for pair in zip(*(self._only_op_in(side) for side in sides), strict=True):
            if pair[0] >= 0 and pair[1] in self._runs:
                yield pair

    def _only_op_in(self, nodes: EventTable) -> list[int]:
        """Return the row of `_ops` inside each node, or -1 where there is none or more than one."""
        found = []
        for thread, start, end in zip(nodes.thread, nodes.start_ns, nodes.end_ns, strict=True):
            inside = (self._ops.thread == thread) & (start <= self._ops.start_ns) & (self._ops.end_ns <= end)
            rows = np.flatnonzero(inside)
            found.append(int(rows[0]) if len(rows) == 1 else -1)
        return found

    def _matched(self, op: int, routers: Collection[str], *, backward: bool = False) -> _GraphCall | None:
        """Return the only graph with some of these routers whose launches match a call, or None."""
        found = [
            call
            for call in self._fitting(op)
            if call.fit.graph.backward == backward
            and any(name in routers for part in call.fit.graph.parts for name in part.routers)
            and self._matcher.launches(call.fit)
        ]
        return found[0] if len(found) == 1 else None

    def _all_fits(self) -> Iterator[Fit]:
        return (call.fit for op in range(len(self._ops)) for call in self._fitting(op))

    def _fitting(self, op: int) -> list[_GraphCall]:
        """Return the graphs that a call may belong to, by the names of its kernels."""
        if op not in self._found:
            self._found[op] = self._find(op)
        return self._found[op]

    def _find(self, op: int) -> list[_GraphCall]:
        ops = self._ops
        launched = self.kernels.within_ns(int(ops.thread[op]), int(ops.start_ns[op]), int(ops.end_ns[op]))
        rows = np.arange(launched.start, launched.stop)
        replayed = np.flatnonzero(np.isin(self.kernels.link[rows], self._replays.link))
        # Kernels that copy a CUDA graph's inputs run before its launch and are not part of it.
        found = self._calls_by_kernels(rows[replayed[0] :]) if len(replayed) else []
        key = key_of(self._events.names[ops.name[op]])
        return [
            call
            for call in found or self._calls_by_kernels(rows)
            if not key or call.fit.graph.key in ("", key)
        ]

    def _calls_by_kernels(self, rows: IntArray) -> list[_GraphCall]:
        rows = rows[np.argsort(self.kernels.start_ns[rows], kind="stable")]
        if len(set(self.kernels.stream[rows].tolist())) != 1:
            return []
        names = (self._events.names[name] for name in self.kernels.name[rows].tolist())
        fits = self._matcher.fits(tuple(_CPP_RANGE.sub("", name) for name in names))
        return [_GraphCall(fit, rows) for fit in fits]


def join_compiled(
    calls: CallTable, graphs: Sequence[CompiledGraph], events: EventTable, kernels: Kernels
) -> CompiledCalls | None:
    """Join the calls inside compiled code with kernels, on a CPU with operators; None if there are none."""
    inside = np.flatnonzero(calls.in_graph & ~np.isnan(calls.places.span("host", "graph")[:, 0]))
    if not len(inside) or not graphs:
        return None
    if not (events.kind == Kind.DEVICE).any():
        kernels = operators_of_calls(events)
    elif not len(kernels.start_ns):
        return None
    return CompiledCalls(calls, inside, graphs, events, kernels)


def compiled_calls(events: EventTable) -> EventTable:
    """Return Inductor's operators, one per call of a compiled graph, sorted by thread and time."""
    ops = events.select((events.kind == Kind.OP) & named(events, CALL))
    return ops.select(np.lexsort((ops.start_ns, ops.thread)))


def key_of(call: str) -> str:
    """Return Inductor's key of the graph that an operator calls, from its name; empty if it has none."""
    key = call.removeprefix(CALL).strip(" #")
    return "" if key == "None" else key


def operators_of_calls(events: EventTable) -> Kernels:
    """Return the outermost operators inside calls of compiled graphs, as the kernels of a CPU."""
    calls = compiled_calls(events)
    ops = events.select((events.kind == Kind.OP) & ~named(events, CALL))
    call_rows = _Stretches(calls.thread.astype(np.int64), calls.start_ns, calls.end_ns).at(
        ops.thread, ops.start_ns, ops.end_ns
    )
    ops = outermost_slices(ops.select(call_rows >= 0))
    return Kernels(
        launch_thread=ops.thread,
        launch_ns=ops.start_ns,
        start_ns=ops.start_ns,
        duration_ns=ops.duration_ns,
        name=ops.name,
        link=np.full(len(ops), NO_LINK),
        stream=ops.thread,
        coverage=Coverage(),
    )


@dataclass(frozen=True, eq=False)
class _Stretches(Intervals):
    """Intervals of calls, which do not overlap on their thread."""

    thread: IntArray
    start_ns: IntArray
    end_ns: IntArray


def named(events: EventTable, prefix: str) -> npt.NDArray[np.bool_]:
    """Return whether the name of each event starts with the prefix."""
    named = np.array([name.startswith(prefix) for name in events.names], bool)
    return named[events.name] if len(named) else np.zeros(len(events), bool)
