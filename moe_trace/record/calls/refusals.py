"""Calls whose decision turns out to be unknown on the host, and routers that contradict themselves."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from moe_trace.data.schema import RoutingSample
from moe_trace.find.contracts import AdapterMismatch
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.calls.settled_rows import disagreement
from moe_trace.record.forward.isolation import warn_user


class CallNumbers:
    """Call numbers per router, stored as runs: a million consecutive numbers take the memory of one."""

    def __init__(self) -> None:
        self.runs: dict[Hashable, list[range]] = {}
        """Runs by router, in order and with gaps between them."""

    def add(self, router: Hashable, calls: range) -> None:
        """Add call numbers, some of which may be present already."""
        if not calls:
            return
        runs = self.runs.setdefault(router, [])
        first = bisect_left(runs, calls.start, key=lambda run: run.stop)
        last = bisect_right(runs, calls.stop, key=lambda run: run.start)
        if first < last:
            calls = range(min(calls.start, runs[first].start), max(calls.stop, runs[last - 1].stop))
        runs[first:last] = [calls]

    def has(self, router: Hashable, call: int) -> bool:
        """Return whether a call number is present."""
        runs = self.runs.get(router, [])
        index = bisect_right(runs, call, key=lambda run: run.start)
        return any(call in run for run in runs[max(0, index - 1) : index])

    def shared(self, other: CallNumbers) -> dict[Hashable, int]:
        """Return, by router, how many calls are present in both, without zeros."""
        counts = {
            router: sum(
                max(0, min(run.stop, other_run.stop) - max(run.start, other_run.start))
                for run in runs
                for other_run in other.runs.get(router, ())
            )
            for router, runs in self.runs.items()
        }
        return {router: count for router, count in counts.items() if count}


class Refusals:
    """Refused calls, counted once however often they are read."""

    def __init__(self) -> None:
        self.why: dict[str, str] = {}
        """Reason by router, from its first refused call."""
        self.by_router: Counter[str] = Counter()
        """Number of unreadable calls by router."""
        self.unjoined: Counter[str] = Counter()
        """Number of calls in `taken_back` that were found, by router."""
        self.taken_back = CallNumbers()
        """Calls recorded as fused, by router name, whose experts turned out to be a module that is called."""
        self._calls = CallNumbers()
        """Refused calls by name and whether they were in graphs, where they are numbered separately."""
        self._compared: set[str] = set()

    def counted(self, record: CallRecord) -> bool:
        """Return whether a call has been refused already."""
        return self._calls.has((record.site.name, record.in_graph), record.call)

    def leave_out(
        self, records: Iterable[CallRecord], samples: Sequence[RoutingSample | AdapterMismatch]
    ) -> list[tuple[CallRecord, RoutingSample]]:
        """Return the calls that are not refused, with their samples."""
        kept: list[tuple[CallRecord, RoutingSample]] = []
        for record, sample in zip(records, samples, strict=True):
            if not record.in_graph and self.taken_back.has(record.site.name, record.call):
                self._count(record, self.unjoined)
            elif isinstance(sample, AdapterMismatch):
                self._count(record, self.by_router)
                if record.site.name not in self.why:
                    self.why[record.site.name] = str(sample)
                    warn_user(f"{record.site.name} cannot be read: {sample}. Such calls are counted as lost")
            else:
                kept.append((record, sample))
                if record.told_E is not None:
                    self._compare(record, sample)
        return kept

    def _count(self, record: CallRecord, calls: Counter[str]) -> None:
        if not self.counted(record):
            number = range(record.call, record.call + 1)
            self._calls.add((record.site.name, record.in_graph), number)
            calls[record.site.name] += 1

    def _compare(self, record: CallRecord, sample: RoutingSample) -> None:
        reported_E, record.told_E = record.told_E, None
        assert reported_E is not None
        mismatch = disagreement(reported_E.cpu().numpy(), sample.assignments, sample.skipped)
        if mismatch is not None and record.site.name not in self._compared:
            self._compared.add(record.site.name)
            warn_user(
                f"{record.site.name} returned {mismatch}: summed over processes, or of another step. What is "
                "recorded are the ids"
            )
