"""Place the forwards that only the device saw: by the counts that were copied at each mark."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from moe_trace.data.schema import GraphMark, RoutingSample, Span
from moe_trace.timeline.correlate.launches import Launch, hull
from moe_trace.timeline.correlate.reasons import (
    MIXED,
    NO_LAUNCH,
    NO_MARK,
    OTHER_COUNT,
    OTHER_STREAM,
    OTHER_TRACE,
    UNKNOWN_GRAPH,
)
from moe_trace.timeline.correlate.replays import Found, Replays


class DeviceForwards:
    """Which launch made which forward, by the counts between marks."""

    def __init__(self, samples: Iterable[RoutingSample], replays: Replays) -> None:
        self._replays = replays
        self._found: dict[int, Launch | str] = {}
        unseen = sorted({s.graph_forward for s in samples if s.graph_forward is not None})
        for before, after in itertools.pairwise(replays.recording.graph_marks):
            mine = [forward for forward in unseen if before.forwards < forward <= after.forwards]
            covers = replays.clock.covers
            if mine and not (covers(before.start_ns) or covers(after.start_ns)):
                self._found.update(dict.fromkeys(mine, OTHER_TRACE))
            elif mine:
                self._found.update(self._match(before, after, mine))

    def placement(self, sample: RoutingSample) -> Found:
        """At the launch that made the call."""
        forward = sample.graph_forward
        found = NO_MARK if forward is None else self._found.get(forward, NO_MARK)
        return found if isinstance(found, str) else self._replays.placement(found, sample.name)

    def _match(
        self, before: GraphMark, after: GraphMark, forwards: Sequence[int]
    ) -> dict[int, Launch] | dict[int, str]:
        """The launch of each forward; or for all of them why it cannot be told."""
        count = (after.forwards - before.forwards) - (after.seen - before.seen)
        mixed = after.seen != before.seen
        writers = MIXED if mixed and len(forwards) != count else self._writers(before, after, count)
        if isinstance(writers, str):
            return dict.fromkeys(forwards, writers)
        # The counter goes up by one with each, so a forward's number is its place among them.
        places = range(len(forwards)) if mixed else [forward - before.forwards - 1 for forward in forwards]
        return {forward: writers[place] for forward, place in zip(forwards, places, strict=True)}

    def _writers(self, before: GraphMark, after: GraphMark, count: int) -> list[Launch] | str:
        """The launches that ran the model in order of time, one for each forward that was counted."""
        start_us, end_us = map(self._replays.clock.time_us, (before.end_ns, after.start_ns))
        between = [
            launch for launch in self._replays.launches.graphs if start_us <= launch.span.start_us <= end_us
        ]
        if not between:
            return NO_LAUNCH
        streams = {self._stream(mark) for mark in (before, after)}
        if None in streams:
            return NO_MARK
        writers = self._of_the_model(between, count, Span(start_us, end_us - start_us))
        if isinstance(writers, str):
            return writers
        if len(streams) > 1 or any(launch.streams != streams for launch in writers):
            return OTHER_STREAM
        return sorted(writers, key=lambda launch: launch.work[0].span.start_us)

    def _of_the_model(self, between: Sequence[Launch], count: int, segment: Span) -> list[Launch] | str:
        known = [launch for launch in between if self._replays.parts_of(launch)]
        if known:
            return known if len(known) == count else OTHER_COUNT
        recording = self._replays.recording
        able = list(between)
        if not recording.captured_graphs or recording.graphs_compiled:
            # Each decision is written by a scatter. Without one outside the graphs, all of them ran inside.
            able = [launch for launch in between if launch.scatters]
            last = hull([segment, *(item.span for launch in able for item in launch.work)])
            if not able or last is None or self._writes_beside(last):
                return UNKNOWN_GRAPH
        # Where all launches replay one and the same graph, each made as many forwards as the others: one, if
        # there are as many.
        alike = len({tuple(item.kernel for item in launch.work) for launch in able}) == 1
        return able if alike and len(able) == count else OTHER_COUNT

    def _writes_beside(self, segment: Span) -> bool:
        launches = self._replays.launches
        times_us = [*(time_us for _, time_us in launches.driver_launches), *launches.scatters_us]
        return any(segment.start_us <= time_us <= segment.end_us for time_us in times_us)

    def _stream(self, mark: GraphMark) -> tuple[Any, Any] | None:
        """The stream on which the mark's count was copied; None where the trace does not hold the copy."""
        start_us, end_us = map(self._replays.clock.time_us, (mark.start_ns, mark.end_ns))
        for launch in self._replays.launches.copies:
            if launch.tid == mark.thread and start_us <= launch.span.start_us <= end_us and launch.work:
                return launch.work[0].stream
        return None
