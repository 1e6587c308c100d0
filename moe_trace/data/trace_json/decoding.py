"""One event of the trace as msgspec reads it: the fields that are asked for, in whatever spelling they come.

A number may be written as 5, 5.0 or "5" (pandas and JavaScript make floats and texts of whole numbers), an id
as "0x1f" or any text. What has no time is no event; what has odd arguments is still one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from moe_trace.data.trace_json.comms import CommArgs
from moe_trace.data.trace_json.stream import loads_lenient

Number = int | float | str | None
NO_LINK = -1
_LINK_BITS = 2**63 - 1


class EventArgs(CommArgs, gc=False):
    correlation: Number = None
    moe_trace: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    """The recording, in the event that carries it."""


class Event(msgspec.Struct, gc=False):
    """`ts` and `dur` are NaN where they are missing: neither is zero."""

    ph: str = ""
    cat: str | None = None
    name: str = ""
    pid: Number = None
    tid: Number = None
    ts: float | str = math.nan
    dur: float | str = math.nan
    id: Number = None
    args: EventArgs | None = None


UNREADABLE = Event(ph="unreadable")
decode_batch = msgspec.json.Decoder(list[Event]).decode
_decode_event = msgspec.json.Decoder(Event).decode


def decode_one(text: bytes) -> Event:
    """An event of a batch that the fast way refuses, as far as it can be understood."""
    try:
        return _decode_event(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        value = loads_lenient(text)
    except (ValueError, OverflowError):
        return UNREADABLE
    try:
        return _decode_event(msgspec.json.encode(value))  # the arguments stay JSON text
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError, TypeError):
        return _without_odd_fields(value)


def _without_odd_fields(value: Any) -> Event:
    """Other tools put what they like into fields; an event is only lost if its time is odd."""
    if not isinstance(value, dict):
        return UNREADABLE
    kept = {key: value[key] for key in ("ph", "cat", "pid", "tid", "ts", "dur", "id") if key in value}
    kept["name"] = name if isinstance(name := value.get("name", ""), str) else str(name)
    args = value.get("args")
    if isinstance(args, dict) and isinstance(args.get("correlation"), (int, float, str)):
        kept["args"] = {"correlation": args["correlation"]}
    if not isinstance(kept.get("id"), (int, float, str)):
        kept.pop("id", None)
    try:
        return msgspec.convert(kept, Event)
    except (msgspec.ValidationError, ValueError, OverflowError):
        return UNREADABLE


def recording_in(events: Iterable[Event]) -> bytes | None:
    """The recording's JSON, if one of the events carries it: the last, for merging adds behind all others."""
    found = None
    for event in events:
        if event.ph == "M" and event.args is not None and event.args.moe_trace is not msgspec.UNSET:
            found = bytes(event.args.moe_trace)
    return found


def whole_number(value: object) -> int | None:
    """5, 5.0, "5", "5.0" and "0x5" are one number; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if not isinstance(value, str) or len(value) > 40:
        return None
    text = value.strip().lower()
    try:
        return int(text, 16) if text.startswith("0x") else int(text)
    except ValueError:
        pass
    try:
        return whole_number(float(text))
    except ValueError:
        return None


class Links:
    """Correlations and ids of flows as 63-bit integers; equal for equal numbers in any spelling."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}

    def of(self, value: Number) -> int:
        """`NO_LINK` where there is none."""
        if type(value) is int:
            return value & _LINK_BITS if value >= 0 else NO_LINK
        if value is None:
            return NO_LINK
        number = whole_number(value)
        if number is not None:
            return number & _LINK_BITS if number >= 0 else NO_LINK
        if not isinstance(value, str) or not value.strip():
            return NO_LINK
        # A name as an id: a number that no counter reaches.
        return self._texts.setdefault(value, _LINK_BITS - 1 - len(self._texts))


def times_us(values: list[float | str]) -> list[float]:
    """Times in microseconds, NaN for text that is no number."""

    def one(value: float | str) -> float:
        try:
            return float(value)
        except ValueError:
            return math.nan

    return [one(value) for value in values]
