"""Select the events of one process from a file that another tool merged from several ranks.

Each process numbers its correlations, flows and ranges separately, so none of them can be joined before the
process of the events is known. Host events contain it. A device's lane (its process id in the trace) belongs
to the process of the same id or, without one, to the only process that can have launched its work: one that
has these correlations, with no launch that began after its kernel. If several fit, the lane has no owner: its
kernels remain without a launch and are counted as such.
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

_MIN_SHARE = 0.9
"""Minimum share of a lane's kernels that its process must have launched."""
_MIN_MARGIN = 0.02
"""Minimum margin in that share over any other process."""


def events_of_recording(events: EventTable, samples: Sequence[RoutingSample]) -> EventTable:
    """Return the events of the process whose router calls were recorded, or all for a single process."""
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
    unowned = device & np.isin(pids, [lane for lane, owner in owners.items() if owner is None])
    lanes_of_own = np.isin(pids, [lane for lane, owner in owners.items() if owner == own])
    selected = np.where(device, unowned | lanes_of_own, pids == own)
    link = np.where(unowned, NO_LINK, events.link)
    kept = replace(events, link=link).select(selected)
    of_thread = _pid_of_thread(events)
    return replace(
        kept, comms=tuple(c for c in events.comms if of_thread[c.thread] == own), processes=len(hosts)
    )


def _pid_of_thread(events: EventTable) -> npt.NDArray[np.int64]:
    """Return a number for each thread's process, [threads]: the index of the first thread of that process."""
    first: dict[Any, int] = {}
    return np.array([first.setdefault(pid, i) for i, (pid, _) in enumerate(events.threads)], np.int64)


def _pids(events: EventTable) -> npt.NDArray[np.int64]:
    return _pid_of_thread(events)[events.thread] if events.threads else np.zeros(0, np.int64)


def _process_of(
    samples: Sequence[RoutingSample], events: EventTable, pids: npt.NDArray[np.int64]
) -> int | None:
    """Return the process with most of the calls' ranges, the first in the file if several tie."""
    starts_wanted = {
        (range_name(kind, sample.site), int(to_ns(span.start_us)))
        for sample in samples
        if sample.placement is not None
        for kind, span in sample.placement.host.items()
    }
    rows = np.flatnonzero(events.kind == Kind.RANGE)
    columns = (column[rows].tolist() for column in (pids, events.name, events.start_ns))
    ranges = zip(*columns, strict=True)
    hits = Counter(pid for pid, name, start in ranges if (events.names[name], start) in starts_wanted)
    return max(hits, key=hits.__getitem__, default=None)


def _owners(
    lanes: Sequence[int], hosts: Sequence[int], events: EventTable, pids: npt.NDArray[np.int64]
) -> dict[int, int | None]:
    """Return the process of each lane, or None if unknown.

    A launch has its kernels in one lane, so launches matched to one lane are excluded for the next.
    """
    owners: dict[int, int | None] = {lane: lane if lane in hosts else None for lane in lanes}
    kernels = {lane: events.select((events.kind == Kind.DEVICE) & (pids == lane)) for lane in lanes}
    launches = {host: events.select((events.kind == Kind.LAUNCH) & (pids == host)) for host in hosts}
    newly_owned = [lane for lane in lanes if owners[lane] is not None]
    while True:
        for lane in newly_owned:
            host = owners[lane]
            assert host is not None
            free = ~np.isin(launches[host].link, kernels[lane].link)
            launches[host] = launches[host].select(free)
        newly_owned = []
        for lane in (lane for lane, owner in owners.items() if owner is None):
            fits = {host: _share_launched(kernels[lane], launches[host]) for host in hosts}
            best, second, *_ = sorted(fits.values(), reverse=True)
            if best >= _MIN_SHARE and best - second >= _MIN_MARGIN:
                owners[lane] = max(fits, key=fits.__getitem__)
                newly_owned.append(lane)
        if not newly_owned:
            return owners


def _share_launched(kernels: EventTable, launches: EventTable) -> float:
    """Return the share of the kernels that have a launch among these which began before them."""
    launch_rows = find_links(kernels.link, launches.link)
    known = launch_rows >= 0
    known[known] = launches.start_ns[launch_rows[known]] <= kernels.start_ns[known]
    return float(known.mean())
