"""Calls whose decision turns out on the host to be unknown, and routers that contradict themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from moe_trace.data.schema import RoutingSample
from moe_trace.find.contracts import AdapterMismatch
from moe_trace.record.calls.call import CallRecord
from moe_trace.record.calls.settled_rows import disagreement
from moe_trace.record.forward.isolation import warn_user


class Refusals:
    """What was refused, however often the same calls are asked for."""

    def __init__(self) -> None:
        self.why: dict[str, str] = {}
        """By router: of its first such call."""
        self.by_router: Counter[str] = Counter()
        """How many calls of each."""
        self.unjoined: Counter[str] = Counter()
        """The same of those that were taken back."""
        self._taken_back: set[tuple[str, int]] = set()
        self._calls: set[tuple[str, int]] = set()
        self._compared: set[str] = set()

    def take_back(self, name: str, calls: range) -> None:
        """Calls were recorded as fused ones, and its experts are a module that is called."""
        if calls:
            self._taken_back.update((name, call) for call in calls)

    def counted(self, record: CallRecord) -> bool:
        """Whether a call was refused already."""
        return (record.site.name, record.call) in self._calls

    def leave_out(
        self, records: Iterable[CallRecord], samples: Sequence[RoutingSample | AdapterMismatch]
    ) -> list[tuple[CallRecord, RoutingSample]]:
        """The calls that were not refused."""
        kept: list[tuple[CallRecord, RoutingSample]] = []
        for record, sample in zip(records, samples, strict=True):
            if (key := (record.site.name, record.call)) in self._taken_back:
                self.unjoined[key[0]] += key not in self._calls
                self._calls.add(key)
            elif isinstance(sample, AdapterMismatch):
                self._refuse(record, str(sample))
            else:
                kept.append((record, sample))
                if record.told_E is not None:
                    self._compare(record, sample)
        return kept

    def _refuse(self, record: CallRecord, why: str) -> None:
        name = record.site.name
        if (name, record.call) not in self._calls:
            self._calls.add((name, record.call))
            self.by_router[name] += 1
        if name not in self.why:
            self.why[name] = why
            warn_user(f"{name} cannot be read: {why}. Such calls are counted as lost")

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
