"""The events of one process, out of a file that another tool put together from several ranks.

Correlations, flows and ranges are numbered by each process for itself, so none of them joins anything before
it is known whose events these are. Host events say so themselves. A device's lane (its process id in the
trace) belongs to the process of the same id; without one, to the only process whose launches can have made
its work: with these correlations, and none begun after its kernel. Where several fit it is nobody's: its
kernels stay without a launch, and count as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.data.schema import RoutingSample, range_name
from moe_trace.data.trace_json.decoding import NO_LINK
from moe_trace.data.trace_json.events import EventTable, Kind, find_links, to_ns

_FITS = 0.9
"""Share of a lane's kernels that its process must have launched."""
_APART = 0.02
"""How much less of them any other process may have launched."""


def events_of_recording(events: EventTable, samples: Sequence[RoutingSample]) -> EventTable:
    """Those of the process whose router calls were recorded; all of them where there is one process only."""
    pids = _pids(events)
    hosts = list(dict.fromkeys(pids[np.flatnonzero(events.kind == Kind.OP)].tolist())) if len(pids) else []
    if len(hosts) < 2:
        return events
    own = _process_of(samples, events, pids)
    if own is None:
        return events
    lanes = dict.fromkeys(pids[np.flatnonzero(events.kind == Kind.DEVICE)].tolist())
    owners = _owners(list(lanes), hosts, events, pids)
    device = events.kind == Kind.DEVICE
    nobodys = device & np.isin(pids, [lane for lane, owner in owners.items() if owner is None])
    lanes_of_own = np.isin(pids, [lane for lane, owner in owners.items() if owner == own])
    mine = np.where(device, nobodys | lanes_of_own, pids == own)
    link = np.where(nobodys, NO_LINK, events.link)
    kept = replace(events, link=link).select(mine)
    of_thread = _pid_of_thread(events)
    return replace(
        kept, comms=tuple(c for c in events.comms if of_thread[c.thread] == own), processes=len(hosts)
    )


def _pid_of_thread(events: EventTable) -> npt.NDArray[np.int64]:
    """[threads] the first thread's index among those of the same process stands for the process."""
    first: dict[Any, int] = {}
    return np.array([first.setdefault(pid, i) for i, (pid, _) in enumerate(events.threads)], np.int64)


def _pids(events: EventTable) -> npt.NDArray[np.int64]:
    return _pid_of_thread(events)[events.thread] if events.threads else np.zeros(0, np.int64)


def _process_of(
    samples: Sequence[RoutingSample], events: EventTable, pids: npt.NDArray[np.int64]
) -> int | None:
    """The process with most of the calls' ranges, the first in the file of several with as many."""
    wanted = {
        (range_name(kind, sample.site), int(to_ns(span.start_us)))
        for sample in samples
        if sample.placement is not None
        for kind, span in sample.placement.host.items()
    }
    rows = np.flatnonzero(events.kind == Kind.RANGE)
    columns = (column[rows].tolist() for column in (pids, events.name, events.start_ns))
    ranges = zip(*columns, strict=True)
    hits = Counter(pid for pid, name, start in ranges if (events.names[name], start) in wanted)
    return max(hits, key=hits.__getitem__, default=None)


def _owners(
    lanes: Sequence[int], hosts: Sequence[int], events: EventTable, pids: npt.NDArray[np.int64]
) -> dict[int, int | None]:
    """Lane -> its process, None where that cannot be told.

    A launch has its kernels in one lane: what is found for one is out of the question for the next.
    """
    owners: dict[int, int | None] = {lane: lane if lane in hosts else None for lane in lanes}
    kernels = {lane: events.select((events.kind == Kind.DEVICE) & (pids == lane)) for lane in lanes}
    launches = {host: events.select((events.kind == Kind.LAUNCH) & (pids == host)) for host in hosts}
    found = [lane for lane in lanes if owners[lane] is not None]
    while True:
        for lane in found:
            host = owners[lane]
            assert host is not None
            free = ~np.isin(launches[host].link, kernels[lane].link)
            launches[host] = launches[host].select(free)
        found = []
        for lane in (lane for lane, owner in owners.items() if owner is None):
            fits = {host: _share_launched(kernels[lane], launches[host]) for host in hosts}
            best, second, *_ = sorted(fits.values(), reverse=True)
            if best >= _FITS and best - second >= _APART:
                owners[lane] = max(fits, key=fits.__getitem__)
                found.append(lane)
        if not found:
            return owners


def _share_launched(kernels: EventTable, launches: EventTable) -> float:
    """Share of the kernels that have a launch among these, begun before them."""
    at = find_links(kernels.link, launches.link)
    known = at >= 0
    known[known] = launches.start_ns[at[known]] <= kernels.start_ns[known]
    return float(known.mean())
