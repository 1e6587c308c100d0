"""The work and time that MoE is a share of: of the whole trace, and apart for each step and stage.

Which work belongs to which stage:

    profiler step with calls of one stage    all that was launched inside the step
    steps or stages within one profiler      cut between two forwards, at the first `aten::embedding` between
    step, or without any                     the last MoE layer of one and the first of the next: the head and
                                             the sampling belong to the forward before, as does a backward

Work is what was launched in that time, by any thread: device busy time, on a CPU time in operators. That of
the backward was launched inside autograd's nodes, where gradient checkpointing runs forwards again; that of
the optimizer inside the ranges that `torch.optim` opens; the rest is the forward's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.schema import RoutingSample, Stage
from moe_trace.data.trace_json.events import EventTable, Kind
from moe_trace.data.trace_json.intervals import outermost_slices
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.read.file.filters import Filter
from moe_trace.read.time.blocks import host_bounds_ns
from moe_trace.read.time.phases import IntArray
from moe_trace.timeline.correlate.compiled_operators import compiled_calls

STEP_RANGE = "ProfilerStep#"
FORWARD_BEGINS = "aten::embedding"
AUTOGRAD_NODE = "autograd::engine::evaluate_function"
OPTIMIZER_RANGE = "Optimizer."

Key = tuple[int, Stage]
"""Step and stage."""
Bounds = tuple[int, int]
"""Start and end in nanoseconds."""


@dataclass(frozen=True, eq=False)
class TraceTotals:
    """Work and time of the whole trace, or of a part of it, which the shares are of; None: not known."""

    model_work_us: float | None
    step_us: float | None
    """Host time of the profiler's steps."""
    backward_work_us: float | None = 0.0
    """The part of the work that the backward launched; 0 without one."""
    optimizer_work_us: float | None = 0.0


NOTHING = TraceTotals(0.0, None)
UNKNOWN = TraceTotals(None, None, None, None)


@dataclass(frozen=True, eq=False)
class TraceWork:
    """The work of one trace, as a whole and by step and stage."""

    whole: TraceTotals
    parts: Mapping[Key, TraceTotals]
    """Of the steps and stages whose time can be separated."""
    calls: frozenset[Key]
    """All that have calls in the recording."""

    def of(self, chosen: Filter) -> TraceTotals:
        """Of the chosen steps and stages; filters by layer leave it as it is."""
        taken = {key for key in self.calls if chosen.takes_time(*key)}
        if taken == self.calls:
            return self.whole
        if not taken <= self.parts.keys():
            return UNKNOWN
        return add_surroundings([self.parts[key] for key in sorted(taken)])


def add_surroundings(parts: Sequence[TraceTotals]) -> TraceTotals:
    """Their sum; what one of them does not know, the sum does not."""
    if not parts:
        return NOTHING

    def added(name: str) -> float | None:
        values = [getattr(part, name) for part in parts]
        return None if None in values else sum(values)

    return TraceTotals(**{name: added(name) for name in TraceTotals.__dataclass_fields__})


def trace_work(samples: Sequence[RoutingSample], events: EventTable, kernels: Kernels) -> TraceWork:
    """The work of a trace and of its parts."""
    steps = step_ranges(events)
    if (events.kind == Kind.DEVICE).any():
        all_ns = int(events.duration_ns[events.kind == Kind.DEVICE].sum())
        launch_ns, duration_ns = kernels.launch_ns, kernels.duration_ns
    else:
        ops = outermost_slices(_without_wrappers(events.select(events.kind == Kind.OP)))
        all_ns = int(ops.duration_ns.sum())
        launch_ns, duration_ns = ops.start_ns, ops.duration_ns
    of_each = [
        np.ones(len(launch_ns), bool),
        _starts_within(events, Kind.OP, AUTOGRAD_NODE, launch_ns),
        _starts_within(events, Kind.RANGE, OPTIMIZER_RANGE, launch_ns),
    ]
    work, *parts = (_Work.sort(launch_ns, np.where(of, duration_ns, 0)) for of in of_each)
    step_us = sum(end - start for start, end in steps.values()) / 1000 if steps else None
    return TraceWork(
        whole=TraceTotals(all_ns / 1000, step_us, *(int(part.before_ns[-1]) / 1000 for part in parts)),
        parts={
            key: TraceTotals(
                work.within_us(windows),
                sum(end - start for start, end in windows) / 1000 if steps else None,
                *(part.within_us(windows) for part in parts),
            )
            for key, windows in find_windows(samples, events, steps).items()
        },
        calls=frozenset(_keys(CallTable.of(samples))),
    )


def _without_wrappers(ops: EventTable) -> EventTable:
    """Without what only holds calls of compiled graphs: the work is that of their operators and kernels."""
    calls = compiled_calls(ops)
    if not len(calls):
        return ops
    stride = int(max(ops.end_ns.max(), 0)) + 1
    starts = calls.thread.astype(np.int64) * stride + calls.start_ns
    at = np.searchsorted(starts, ops.thread.astype(np.int64) * stride + ops.start_ns)
    first = np.minimum(at, len(calls) - 1)
    holds = (at < len(calls)) & (calls.thread[first] == ops.thread) & (calls.end_ns[first] <= ops.end_ns)
    return ops.select(~holds)


def _starts_within(events: EventTable, kind: Kind, name: str, times_ns: IntArray) -> npt.NDArray[np.bool_]:
    """Which times lie inside a slice whose name begins so, on any thread."""
    names = np.array([text.startswith(name) for text in events.names], bool)
    slices = events.select((events.kind == kind) & names[events.name])
    slices = slices.select(np.argsort(slices.start_ns, kind="stable"))
    ends_ns = np.concatenate([[np.iinfo(np.int64).min], np.maximum.accumulate(slices.end_ns)])
    return times_ns < ends_ns[np.searchsorted(slices.start_ns, times_ns, "right")]


def step_ranges(events: EventTable) -> dict[int, Bounds]:
    """Start and end in nanoseconds of the profiler's steps."""
    found = {}
    ranges = events.select(events.kind == Kind.RANGE)
    for name, start, end in zip(
        ranges.name.tolist(), ranges.start_ns.tolist(), ranges.end_ns.tolist(), strict=True
    ):
        text = events.names[name]
        number = text.removeprefix(STEP_RANGE)
        if text.startswith(STEP_RANGE) and number.isdecimal() and len(number) < 19:
            found[int(number)] = (start, end)
    return found


@dataclass(frozen=True, eq=False)
class _Work:
    """Pieces of work by the time at which they were launched."""

    launch_ns: IntArray
    before_ns: IntArray
    """[N + 1] work of all earlier pieces."""

    @classmethod
    def sort(cls, launch_ns: IntArray, duration_ns: IntArray) -> _Work:
        order = np.argsort(launch_ns, kind="stable")
        return cls(launch_ns[order], np.concatenate([[0], np.cumsum(duration_ns[order])]))

    def within_us(self, windows: Sequence[Bounds]) -> float:
        """What was launched in those stretches of time."""
        first, last = np.searchsorted(self.launch_ns, np.array(windows).T, "left")
        return int((self.before_ns[last] - self.before_ns[first]).sum()) / 1000


# -- windows --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Forward:
    """Calls of one step and stage that follow one another."""

    key: Key
    start_ns: int
    end_ns: int
    starts_itself: bool
    """Whether `start_ns` is the start of the whole forward, rather than that of its first MoE layer."""


def find_windows(
    samples: Sequence[RoutingSample], events: EventTable, steps: Mapping[int, Bounds]
) -> dict[Key, list[Bounds]]:
    """The stretches of host time of each step and stage, without those that cannot be separated."""
    forwards = _forwards(samples)
    ranges = [(start, end) for start, end in steps.values()] or [_everything(events)]
    begins = _starts_of(events, FORWARD_BEGINS)
    found: dict[Key, list[Bounds]] = {}
    unknown = set(_keys(CallTable.of(samples))) - {forward.key for forward in forwards}
    for start, end in ranges:
        inside = [f for f in forwards if start <= f.start_ns < end]
        windows = _split(inside, (start, end), begins)
        for forward in inside:
            if windows is None:
                unknown.add(forward.key)
        for key, window in windows or ():
            found.setdefault(key, []).append(window)
    outside = {f.key for f in forwards if not any(s <= f.start_ns < e for s, e in ranges)}
    return {key: windows for key, windows in found.items() if key not in unknown | outside}


def _split(forwards: Sequence[_Forward], bounds: Bounds, begins: IntArray) -> list[tuple[Key, Bounds]] | None:
    """One window a forward, which together fill the bounds; None where a cut is not known."""
    if not forwards:
        return []
    cuts = [bounds[0]]
    for before, after in itertools.pairwise(forwards):
        at = int(np.searchsorted(begins, before.end_ns, "left"))
        if at < len(begins) and begins[at] < after.start_ns:
            cuts.append(int(begins[at]))
        elif after.starts_itself and before.end_ns <= after.start_ns:
            cuts.append(after.start_ns)
        else:
            return None
    ends = [*cuts[1:], bounds[1]]
    return [(forward.key, (cut, end)) for forward, cut, end in zip(forwards, cuts, ends, strict=True)]


def _keys(calls: CallTable) -> list[Key]:
    return list(zip(calls.step.tolist(), calls.stage.tolist(), strict=True))


def _forwards(samples: Sequence[RoutingSample]) -> list[_Forward]:
    table = CallTable.of(samples)
    bounds = host_bounds_ns(table)
    order = np.argsort(bounds[:, 0], kind="stable")
    order = order[bounds[order, 0] <= bounds[order, 1]]
    table = table.take(order)
    in_graph = ~np.isnan(table.duration_us("host", "graph"))
    rows = zip(_keys(table), bounds[order].tolist(), in_graph.tolist(), strict=True)
    calls = [_Forward(key, start, end, graph) for key, (start, end), graph in rows]
    found: list[_Forward] = []
    for call in calls:
        if found and found[-1].key == call.key:
            last = found[-1]
            found[-1] = _Forward(last.key, last.start_ns, max(last.end_ns, call.end_ns), last.starts_itself)
        else:
            found.append(call)
    return found


def _everything(events: EventTable) -> Bounds:
    host = events.select(events.kind != Kind.DEVICE)
    return int(host.start_ns.min(initial=0)), int(host.end_ns.max(initial=0)) + 1


def _starts_of(events: EventTable, name: str) -> IntArray:
    if name not in events.names:
        return np.zeros(0, np.int64)
    rows = (events.kind == Kind.OP) & (events.name == events.names.index(name))
    return np.sort(events.start_ns[rows])
