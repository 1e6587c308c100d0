"""Rewrite the events of one rank for a trace of several: processes, ids and times that no other rank has.

process    keeps its id, unless another rank has it: then the next free one above those that Linux gives
flow, External id, correlation    id x ranks + place of the rank, so that arrows and joins stay within it
time       + (its base - the common base) + the offset of its clock, in whole nanoseconds
names      "rank 3 python", "rank 3 GPU 0", ranks one under the other, their MoE bands together on top
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_trace.data.schema import BAND_PID, is_band

Event = dict[str, Any]
Pid = int | str

FIRST_FREE_PID = 2**22
"""Linux hands out process ids below this; the bands' ids lie far above."""
_IDS = ("External id", "external id", "correlation", "Correlation id")
_DEVICE_SORT_INDEX = 5_000_000
"""Kineto sorts devices from here on, processes by their id."""
_ROWS_A_RANK = 1000
_TIME_MAX_US = 4e15


@dataclass
class Pids:
    """Process ids of all ranks, none given twice."""

    _given: dict[tuple[int, Pid], Pid] = field(default_factory=dict)
    _taken: set[Pid] = field(default_factory=set)
    _free: int = FIRST_FREE_PID

    def of(self, rank: int, pid: Pid) -> Pid:
        """The id in the merged trace."""
        key = (rank, pid)
        if key not in self._given:
            self._given[key] = self._new(rank, pid)
            self._taken.add(self._given[key])
        return self._given[key]

    def _new(self, rank: int, pid: Pid) -> Pid:
        if is_band(pid):
            return BAND_PID + rank
        if pid not in self._taken:
            return pid
        if isinstance(pid, str):
            return f"{pid} (rank {rank})"
        self._free += 1
        return self._free - 1

    def of_rank(self, rank: int) -> tuple[Pid, ...]:
        """All that were given to a rank, in the order of their first event."""
        return tuple(given for (of, _), given in self._given.items() if of == rank)


@dataclass(frozen=True)
class Renamer:
    """Rewrites the events of one rank, in place."""

    rank: int
    place: int
    """0, 1, 2 ... among the ranks that are merged."""
    ranks: int
    """How many are merged."""
    shift_ns: int
    pids: Pids

    def rename(self, event: Event) -> Event:
        """The same event, as the merged trace has it."""
        pid = event.get("pid")
        if isinstance(pid, (int, str)) and not isinstance(pid, bool):
            event["pid"] = self.pids.of(self.rank, pid)
        if self.shift_ns and isinstance(event.get("ts"), (int, float)):
            event["ts"] = self.shifted(event["ts"])
        if "id" in event:
            event["id"] = self._identity(event["id"])
        arguments = event.get("args")
        if isinstance(arguments, dict):
            for name in _IDS:
                if name in arguments:
                    arguments[name] = self._identity(arguments[name])
        if event.get("ph") == "M":
            self._rename_metadata(event, pid)
        return event

    def shifted(self, time_us: float) -> float:
        """On the common clock."""
        if not -_TIME_MAX_US < time_us < _TIME_MAX_US:  # no clock shows it, and no reader takes it
            return time_us
        return (round(time_us * 1000) + self.shift_ns) / 1000

    def _identity(self, value: Any) -> Any:
        if type(value) is int:
            return value * self.ranks + self.place
        if isinstance(value, str) and value.isdecimal() and len(value) < 19:
            return str(int(value) * self.ranks + self.place)
        return f"{value} (rank {self.rank})" if isinstance(value, str) else value

    def _rename_metadata(self, event: Event, pid: object) -> None:
        arguments = event.get("args")
        if not isinstance(arguments, dict) or is_band(pid):
            return
        name = event.get("name")
        if name == "process_name":
            arguments["name"] = f"rank {self.rank} {arguments.get('name', '')}".rstrip()
        elif name == "process_labels":
            arguments["labels"] = f"rank {self.rank} {arguments.get('labels', '')}".rstrip()
        elif name == "process_sort_index" and isinstance(arguments.get("sort_index"), int):
            device = arguments["sort_index"] - _DEVICE_SORT_INDEX
            row = 0 if device < 0 else 1 + min(device, _ROWS_A_RANK - 2)
            arguments["sort_index"] = self.place * _ROWS_A_RANK + row
