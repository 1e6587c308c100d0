"""Parsing of a trace's top-level keys other than its events: devices, clock base, process groups."""

from __future__ import annotations

from moe_trace.data.trace_json.stream import value_or_none

KEYS = ("deviceProperties", "baseTimeNanoseconds", "host_name", "distributedInfo")


def device_names(text: bytes) -> tuple[str, ...]:
    devices = value_or_none(text)
    if not isinstance(devices, list):
        return ()
    return tuple(str(d["name"]) for d in devices if isinstance(d, dict) and isinstance(d.get("name"), str))


def base_time(text: bytes) -> int:
    """Return nanoseconds; 0 if the value is invalid. Some tools write integers as floats or strings."""
    value = value_or_none(text)
    if isinstance(value, str) and len(value) < 20 and value.removeprefix("-").isdecimal():
        value = int(value)
    if type(value) not in (int, float) or not abs(value) < 2**62:
        return 0
    return int(value)


def host_name(text: bytes) -> str | None:
    value = value_or_none(text)
    return value if isinstance(value, str) and value else None


def group_ranks(text: bytes) -> tuple[tuple[int, ...], ...]:
    """Return each set of ranks once, in the order of the file."""
    info = value_or_none(text)
    groups = info.get("pg_config") if isinstance(info, dict) else None
    found = []
    for group in groups if isinstance(groups, list) else []:
        ranks = group.get("ranks") if isinstance(group, dict) else None
        if isinstance(ranks, list) and len(ranks) > 1 and all(type(r) is int for r in ranks):
            found.append(tuple(ranks))
    return tuple(dict.fromkeys(found))
