"""Work and time that MoE is a share of, for the whole trace and for each step and stage.

Assignment of work to stages:

    profiler step with calls of one stage    all that was launched inside the step
    steps or stages within one profiler      cut between two forwards, at the first `aten::embedding` between
    step, or without any                     the last MoE layer of one and the first of the next: the head and
                                             the sampling belong to the forward before, as does a backward

Work is what any thread launched in that time: device busy time, or time in operators on a CPU. Work of the
backward was launched inside autograd's nodes, where gradient checkpointing reruns forwards; work of the
optimizer inside the ranges that `torch.optim` opens; the rest belongs to the forward.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable
from moe_trace.data.schema import Stage
from moe_trace.data.trace_json.events import EventTable, Kind
from moe_trace.data.trace_json.intervals import outermost_slices
from moe_trace.data.trace_json.kernels import Kernels
from moe_trace.read.file.filters import Filter
from moe_trace.read.time.blocks import host_bounds_ns
from moe_trace.read.time.phases import IntArray
from moe_trace.timeline.correlate.compiled_calls import compiled_calls, named

STEP_RANGE = "ProfilerStep#"
FORWARD_BEGINS = "aten::embedding"
AUTOGRAD_NODE = "autograd::engine::evaluate_function"
OPTIMIZER_RANGE = "Optimizer."

Key = tuple[int, Stage]
"""(step, stage)"""
Bounds = tuple[int, int]
"""(start, end) in nanoseconds."""


@dataclass(frozen=True, eq=False)
class TraceTotals:
    """Work and time of the whole trace or a part of it, the base of shares; None if unknown."""

    model_work_us: float | None
    step_us: float | None
    """Host time of the profiler's steps."""
    backward_work_us: float | None = 0.0
    """Part of the work that the backward launched; 0 without one."""
    optimizer_work_us: float | None = 0.0


NOTHING = TraceTotals(0.0, None)
UNKNOWN = TraceTotals(None, None, None, None)


@dataclass(frozen=True, eq=False)
class TraceWork:
    """Work of one trace, in total and by step and stage."""

    whole: TraceTotals
    parts: Mapping[Key, TraceTotals]
    """Totals of the steps and stages whose time can be separated."""
    calls: frozenset[Key]
    """All steps and stages with calls in the recording."""

    def of(self, chosen: Filter) -> TraceTotals:
        """Return the totals of the chosen steps and stages; filters by layer do not change them."""
        taken = {key for key in self.calls if chosen.takes_time(*key)}
        if taken == self.calls:
            return self.whole
        if not taken <= self.parts.keys():
            return UNKNOWN
        return total_work([self.parts[key] for key in sorted(taken)])


def total_work(parts: Sequence[TraceTotals]) -> TraceTotals:
    """Add totals; a value that one of them lacks is unknown in the sum."""
    if not parts:
        return NOTHING

    def added(name: str) -> float | None:
        values = [getattr(part, name) for part in parts]
        return None if None in values else sum(values)

    return TraceTotals(**{name: added(name) for name in TraceTotals.__dataclass_fields__})


def trace_work(calls: CallTable, events: EventTable, kernels: Kernels) -> TraceWork:
    """Compute the work of a trace and of its parts."""
    steps = step_ranges(events)
    if (events.kind == Kind.DEVICE).any():
        all_ns = int(events.duration_ns[events.kind == Kind.DEVICE].sum())
        launch_ns, duration_ns = kernels.launch_ns, kernels.duration_ns
    else:
        ops = outermost_slices(_without_wrappers(events.select(events.kind == Kind.OP)))
        all_ns = int(ops.duration_ns.sum())
        launch_ns, duration_ns = ops.start_ns, ops.duration_ns
    order = np.argsort(launch_ns, kind="stable")
    launch_ns, duration_ns = launch_ns[order], duration_ns[order]
    backward = _starts_within(events, Kind.OP, AUTOGRAD_NODE, launch_ns)
    optimizer = _starts_within(events, Kind.RANGE, OPTIMIZER_RANGE, launch_ns)
    before_ns = np.zeros((3, len(launch_ns) + 1), np.int64)  # work of all earlier pieces
    parts_ns = np.stack([duration_ns, duration_ns * backward, duration_ns * optimizer])
    np.cumsum(parts_ns, axis=1, out=before_ns[:, 1:])

    def within(windows: Sequence[Bounds]) -> TraceTotals:
        first, last = np.searchsorted(launch_ns, np.array(windows).T)
        model, *parts = ((before_ns[:, last] - before_ns[:, first]).sum(1) / 1000).tolist()
        return TraceTotals(model, _total_us(windows) if steps else None, *parts)

    step_us = _total_us(steps.values()) if steps else None
    return TraceWork(
        whole=TraceTotals(all_ns / 1000, step_us, *(before_ns[1:, -1] / 1000).tolist()),
        parts={key: within(windows) for key, windows in find_windows(calls, events, steps).items()},
        calls=frozenset(_keys(calls)),
    )


def _total_us(stretches: Iterable[Bounds]) -> float:
    return sum(end - start for start, end in stretches) / 1000


def _without_wrappers(ops: EventTable) -> EventTable:
    """Remove operators that only contain calls of compiled graphs, as their work is that of the contents."""
    calls = compiled_calls(ops)
    if not len(calls):
        return ops
    stride = int(max(ops.end_ns.max(), 0)) + 1
    starts = calls.thread.astype(np.int64) * stride + calls.start_ns
    position = np.searchsorted(starts, ops.thread.astype(np.int64) * stride + ops.start_ns)
    first = np.minimum(position, len(calls) - 1)
    holds = (
        (position < len(calls)) & (calls.thread[first] == ops.thread) & (calls.end_ns[first] <= ops.end_ns)
    )
    return ops.select(~holds)


def _starts_within(events: EventTable, kind: Kind, name: str, times_ns: IntArray) -> npt.NDArray[np.bool_]:
    """Return which times are inside a slice whose name has this prefix, on any thread."""
    slices = events.select((events.kind == kind) & named(events, name))
    slices = slices.select(np.argsort(slices.start_ns, kind="stable"))
    ends_ns = np.concatenate([[np.iinfo(np.int64).min], np.maximum.accumulate(slices.end_ns)])
    return times_ns < ends_ns[np.searchsorted(slices.start_ns, times_ns, "right")]


def step_ranges(events: EventTable) -> dict[int, Bounds]:
    """Return start and end of the profiler's steps, in nanoseconds."""
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


# -- windows --------------------------------------------------------------------------------------------


class _Forward(NamedTuple):
    """Consecutive calls of one step and stage."""

    key: Key
    start_ns: int
    end_ns: int
    starts_itself: bool
    """Whether `start_ns` is the start of the whole forward, rather than that of its first MoE layer."""


def find_windows(
    calls: CallTable, events: EventTable, steps: Mapping[int, Bounds]
) -> dict[Key, list[Bounds]]:
    """Return the intervals of host time of each step and stage, without those that cannot be separated."""
    forwards = _forwards(calls)
    begins_one = np.array([name == FORWARD_BEGINS for name in events.names], bool)[events.name]
    begins = np.sort(events.start_ns[(events.kind == Kind.OP) & begins_one])
    cuts = [_boundary(before, after, begins) for before, after in itertools.pairwise(forwards)]
    starts = [forward.start_ns for forward in forwards]
    found: dict[Key, list[Bounds]] = {}
    separated: set[int] = set()
    for start, end in steps.values() or [_everything(events)]:
        inside = range(bisect_left(starts, start), bisect_left(starts, end))
        between = cuts[inside.start : inside.stop - 1] if inside else []
        known = [cut for cut in between if cut is not None]
        if len(known) == len(between):
            for at, window in zip(inside, itertools.pairwise([start, *known, end]), strict=False):
                found.setdefault(forwards[at].key, []).append(window)
            separated.update(inside)
    unknown = {forward.key for at, forward in enumerate(forwards) if at not in separated}
    return {key: windows for key, windows in found.items() if key not in unknown}


def _boundary(before: _Forward, after: _Forward, begins: IntArray) -> int | None:
    """Return the boundary between two forwards, or None if it is unknown."""
    position = int(np.searchsorted(begins, before.end_ns))
    if position < len(begins) and begins[position] < after.start_ns:
        return int(begins[position])
    return after.start_ns if after.starts_itself and before.end_ns <= after.start_ns else None


def _keys(calls: CallTable) -> list[Key]:
    return list(zip(calls.step.tolist(), calls.stage.tolist(), strict=True))


def _forwards(calls: CallTable) -> list[_Forward]:
    bounds = host_bounds_ns(calls)
    order = np.argsort(bounds[:, 0], kind="stable")
    order = order[bounds[order, 0] <= bounds[order, 1]]
    calls, bounds = calls.take(order), bounds[order]
    in_graph = ~np.isnan(calls.duration_us("host", "graph"))
    rows = zip(_keys(calls), *bounds.T.tolist(), in_graph.tolist(), strict=True)
    groups = (list(map(_Forward._make, group)) for _, group in itertools.groupby(rows, key=itemgetter(0)))
    return [group[0]._replace(end_ns=max(call.end_ns for call in group)) for group in groups]


def _everything(events: EventTable) -> Bounds:
    host = events.select(events.kind != Kind.DEVICE)
    return int(host.start_ns.min(initial=0)), int(host.end_ns.max(initial=0)) + 1
