"""Decoding of single trace events with msgspec, tolerant of the spellings that tools use.

A number may be written as 5, 5.0 or "5" (pandas and JavaScript turn integers into floats and strings), an id
as "0x1f" or any text. Events without a time are dropped; events with unexpected arguments are kept.
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
    """The recording, in the event that contains it."""


class Event(msgspec.Struct, gc=False):
    """A trace event. `ts` and `dur` are NaN where missing, which is distinct from zero."""

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
    """Decode an event of a batch that the fast path rejects, as far as possible."""
    try:
        return _decode_event(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        value = loads_lenient(text)
    except (ValueError, OverflowError):
        return UNREADABLE
    try:
        return _decode_event(msgspec.json.encode(value))  # keeps the arguments as JSON text
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError, TypeError):
        return _without_odd_fields(value)


def _without_odd_fields(value: Any) -> Event:
    """Drop unexpected fields, which other tools write; an event is lost only if its time is invalid."""
    if not isinstance(value, dict):
        return UNREADABLE
    fields = {key: value[key] for key in ("ph", "cat", "pid", "tid", "ts", "dur", "id") if key in value}
    fields["name"] = name if isinstance(name := value.get("name", ""), str) else str(name)
    args = value.get("args")
    if isinstance(args, dict) and isinstance(args.get("correlation"), (int, float, str)):
        fields["args"] = {"correlation": args["correlation"]}
    if not isinstance(fields.get("id"), (int, float, str)):
        fields.pop("id", None)
    try:
        return msgspec.convert(fields, Event)
    except (msgspec.ValidationError, ValueError, OverflowError):
        return UNREADABLE


def recording_in(events: Iterable[Event]) -> bytes | None:
    """Return the JSON of the last recording in the events; merging appends it after all others."""
    found = None
    for event in events:
        if event.ph == "M" and event.args is not None and event.args.moe_trace is not msgspec.UNSET:
            found = bytes(event.args.moe_trace)
    return found


def whole_number(value: object) -> int | None:
    """Return the integer written as 5, 5.0, "5", "5.0" or "0x5"; None for anything else."""
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
    """Correlations and flow ids as 63-bit integers, equal for equal numbers in any spelling."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}

    def of(self, value: Number) -> int:
        """Return a link's integer; `NO_LINK` without one."""
        if type(value) is int:
            return value & _LINK_BITS if value >= 0 else NO_LINK
        if value is None:
            return NO_LINK
        number = whole_number(value)
        if number is not None:
            return number & _LINK_BITS if number >= 0 else NO_LINK
        if not isinstance(value, str) or not value.strip():
            return NO_LINK
        # Map a textual id to a number that no counter reaches.
        return self._texts.setdefault(value, _LINK_BITS - 1 - len(self._texts))


def times_us(values: list[float | str]) -> list[float]:
    """Return times in microseconds; NaN for text that is not a number."""

    def one(value: float | str) -> float:
        try:
            return float(value)
        except ValueError:
            return math.nan

    return [one(value) for value in values]
