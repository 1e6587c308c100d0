"""Calls whose decision turns out on the host to be unknown, and routers that contradict themselves."""

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
    """Numbers of calls, by router, as the runs that they form: a million in a row take what one does."""

    def __init__(self) -> None:
        self.runs: dict[Hashable, list[range]] = {}
        """By router: in order, with numbers between them."""

    def add(self, router: Hashable, calls: range) -> None:
        """Some more, which may be there already."""
        if not calls:
            return
        runs = self.runs.setdefault(router, [])
        first = bisect_left(runs, calls.start, key=lambda run: run.stop)
        last = bisect_right(runs, calls.stop, key=lambda run: run.start)
        if first < last:
            calls = range(min(calls.start, runs[first].start), max(calls.stop, runs[last - 1].stop))
        runs[first:last] = [calls]

    def has(self, router: Hashable, call: int) -> bool:
        """Whether a call is one of them."""
        runs = self.runs.get(router, [])
        at = bisect_right(runs, call, key=lambda run: run.start)
        return any(call in run for run in runs[max(0, at - 1) : at])

    def shared(self, other: CallNumbers) -> dict[Hashable, int]:
        """How many calls of each router are in both, where any are."""
        counts = {
            router: sum(
                max(0, min(one.stop, two.stop) - max(one.start, two.start))
                for one in runs
                for two in other.runs.get(router, ())
            )
            for router, runs in self.runs.items()
        }
        return {router: count for router, count in counts.items() if count}


class Refusals:
    """What was refused, however often the same calls are asked for."""

    def __init__(self) -> None:
        self.why: dict[str, str] = {}
        """By router: of its first such call."""
        self.by_router: Counter[str] = Counter()
        """How many calls of each."""
        self.unjoined: Counter[str] = Counter()
        """The same of those that were taken back."""
        self.taken_back = CallNumbers()
        """By name: recorded as fused ones, but the experts are a module that is called."""
        self._calls = CallNumbers()
        """By name and whether they were in graphs, where they have numbers of their own."""
        self._compared: set[str] = set()

    def counted(self, record: CallRecord) -> bool:
        """Whether a call was refused already."""
        return self._calls.has((record.site.name, record.in_graph), record.call)

    def leave_out(
        self, records: Iterable[CallRecord], samples: Sequence[RoutingSample | AdapterMismatch]
    ) -> list[tuple[CallRecord, RoutingSample]]:
        """The calls that were not refused."""
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
        told, record.told_E = record.told_E, None
        assert told is not None
        found = disagreement(told.cpu().numpy(), sample.assignments, sample.skipped)
        if found is not None and record.site.name not in self._compared:
            self._compared.add(record.site.name)
            warn_user(
                f"{record.site.name} returned {found}: summed over processes, or of another step. What is "
                "recorded are the ids"
            )
