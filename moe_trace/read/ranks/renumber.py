"""Rewrite the events of one rank for a merged trace, with unique processes and ids and aligned times.

- Processes keep their ids, unless another rank has the same one: then the next free id above those of Linux.
- Ids of flows, `External id` and `correlation` become id x ranks + index of the rank, so that arrows and
  joins stay within the rank.
- Times get + (its base - the common base) + the offset of its clock, in whole nanoseconds.
- Names become "rank 3 python", "rank 3 GPU 0", sorted by rank, with all MoE bands together at the top.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_trace.data.schema import BAND_PID, is_band

Event = dict[str, Any]
Pid = int | str

FIRST_FREE_PID = 2**22
"""First id for renamed processes: Linux's process ids are lower, and the ids of bands are far higher."""
_IDS = ("External id", "external id", "correlation", "Correlation id")
_DEVICE_SORT_INDEX = 5_000_000
"""First sort index that Kineto uses for devices; processes are sorted by their id."""
_ROWS_A_RANK = 1000
_TIME_MAX_US = 4e15


@dataclass
class Pids:
    """Unique process ids for all ranks."""

    _given: dict[tuple[int, Pid], Pid] = field(default_factory=dict)
    _used: set[Pid] = field(default_factory=set)
    _next_free: int = FIRST_FREE_PID

    def of(self, rank: int, pid: Pid) -> Pid:
        """Return the id in the merged trace."""
        key = (rank, pid)
        if key not in self._given:
            self._given[key] = self._new_pid(rank, pid)
            self._used.add(self._given[key])
        return self._given[key]

    def _new_pid(self, rank: int, pid: Pid) -> Pid:
        if is_band(pid):
            return BAND_PID + rank
        if pid not in self._used:
            return pid
        if isinstance(pid, str):
            return f"{pid} (rank {rank})"
        self._next_free += 1
        return self._next_free - 1

    def of_rank(self, rank: int) -> tuple[Pid, ...]:
        """Return all ids assigned to a rank, in the order of their first event."""
        return tuple(given for (of, _), given in self._given.items() if of == rank)


@dataclass(frozen=True)
class Renamer:
    """Rewriter of the events of one rank, in place."""

    rank: int
    place: int
    """Index among the merged ranks."""
    ranks: int
    """Number of merged ranks."""
    shift_ns: int
    pids: Pids

    def rename(self, event: Event) -> Event:
        """Rewrite an event for the merged trace and return it."""
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
        """Convert a timestamp to the common clock."""
        if not -_TIME_MAX_US < time_us < _TIME_MAX_US:  # no clock shows it, and no reader accepts it
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
