"""Time modules on the device without a profiler: CUDA events from a pool, read at the end of the run.

On a CPU, where a module has finished when it returns, the host's clock is used.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_trace.data.schema import RangeKind

ClockName = Literal["host", "cuda_event"]
_Events = tuple[torch.cuda.Event, torch.cuda.Event]

# Maximum number of unread event pairs. Beyond it, completed pairs are read early, which does not wait for the
# device. A pair costs under 1 KB.
_UNREAD_PAIRS_MAX = 2**16


@dataclass(slots=True)
class Mark:
    """One timed call of a module, with host times in nanoseconds and, on CUDA, a pair of events."""

    device: torch.device
    start_ns: int
    end_ns: int = 0
    events: _Events | None = None


@dataclass(slots=True)
class CallTimes:
    """Durations of one router call; None where it was not timed."""

    device: str
    clock: ClockName
    router_ms: float | None = None
    experts_ms: float | None = None


class DeviceClock:
    """A `CallClock` that does not wait for the device until `read`.

    The time between two CUDA events is what elapses on the stream between them: kernels, and the gaps in
    which the device waits for the host to launch the next one.

    Args:
        capacity: number of router calls whose times are kept; beyond it the oldest are dropped.
    """

    def __init__(self, *, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._free: dict[torch.device, list[_Events]] = {}
        self._unread: deque[tuple[CallTimes, RangeKind, torch.device, _Events]] = deque()
        self._times: dict[tuple[str, int], CallTimes] = {}

    def start(self, args: tuple[Any, ...]) -> Mark:
        """Start timing a module called with `args`, on the device of its first tensor."""
        first = next((value for value in args if isinstance(value, Tensor)), None)
        device = torch.device("cpu") if first is None else first.device
        mark = Mark(device, time.perf_counter_ns())
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            mark.events = self._take(device)
            mark.events[0].record(torch.cuda.current_stream(device))
        return mark

    def stop(self, mark: Mark) -> None:
        """Stop timing, after the module has returned."""
        mark.end_ns = time.perf_counter_ns()
        if mark.events is not None:
            mark.events[1].record(torch.cuda.current_stream(mark.device))

    def keep(self, name: str, call: int, kind: RangeKind, mark: Mark) -> None:
        """Store the mark under its router call."""
        clock: ClockName = "cuda_event" if mark.events is not None else "host"
        with self._lock:
            times = self._times.get((name, call))
            if times is None:
                times = self._times[name, call] = CallTimes(str(mark.device), clock)
                while len(self._times) > self._capacity:
                    del self._times[next(iter(self._times))]
            if mark.events is None:
                setattr(times, f"{kind}_ms", (mark.end_ns - mark.start_ns) / 1e6)
            else:
                self._unread.append((times, kind, mark.device, mark.events))

    def read(self) -> dict[tuple[str, int], CallTimes]:
        """Return a mapping from (module path of the router, call) to times. Waits for the device."""
        with self._lock:
            while self._unread:
                self._read_oldest()
            return dict(self._times)

    def _take(self, device: torch.device) -> _Events:
        with self._lock:
            free = self._free.setdefault(device, [])
            if not free and len(self._unread) >= _UNREAD_PAIRS_MAX:
                while self._unread and self._unread[0][3][1].query():
                    self._read_oldest()
            if free:
                return free.pop()
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _read_oldest(self) -> None:
        times, kind, device, events = self._unread.popleft()
        events[1].synchronize()
        setattr(times, f"{kind}_ms", events[0].elapsed_time(events[1]))
        self._free.setdefault(device, []).append(events)
