"""Tests of randomly damaged traces: the numbers of a simple reader, or unknown, or a refusal in one line.

`MOE_TRACE_FUZZ=2000 pytest tests/read/test_reading_fuzz.py` runs more cases (docs/reliability.md has the
number).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_trace.data.errors import MoETraceError
from moe_trace.read.reader import TraceSummary, read_summary
from tiny_trace import write_tiny

Event = dict[str, Any]
TRIED = int(os.environ.get("MOE_TRACE_FUZZ", "60"))


def is_kernel(event: Event) -> bool:
    return event.get("cat") == "kernel"


def is_launch(event: Event) -> bool:
    return str(event.get("cat")).endswith(("_runtime", "_driver"))


def is_range(event: Event) -> bool:
    return event.get("cat") == "user_annotation"


# -- ways to spoil an event: each takes a random number generator, and gives the event back or None ----------


def respell(rng: random.Random, event: Event) -> Event:
    if "correlation" in event["args"]:
        spell = rng.choice([float, str, hex, lambda n: f"{n}.0", lambda n: n])
        event["args"]["correlation"] = spell(int(str(event["args"]["correlation"]).split(".")[0], 0))
    return event


def wrong_correlation(rng: random.Random, event: Event) -> Event:
    if "correlation" in event["args"]:
        nobodys = rng.randrange(10**6, 10**9)  # two of one number would be joined, rightly or not
        wrong = [-1, None, "", f"x{nobodys}", [], 10**30 * nobodys, 1.5, True, nobodys]
        event["args"]["correlation"] = rng.choice(wrong)
    return event


def odd_time(rng: random.Random, event: Event) -> Event:
    event[rng.choice(["ts", "dur"])] = rng.choice([None, "", "soon", [], -1e30, float("nan"), -4e15])
    return event


def time_as_text(rng: random.Random, event: Event) -> Event:
    return {**event, **{key: str(event[key]) for key in ("ts", "dur") if type(event.get(key)) is float}}


def no_time(rng: random.Random, event: Event) -> Event:
    event.pop("ts", None)
    return event


def other_fields(rng: random.Random, event: Event) -> Event:
    event[rng.choice(["id", "bp", "sf", "args2"])] = rng.choice(
        [None, {}, [{"a": 1}, {"b": 2}], "\ud83d", 1e400]
    )
    return event


def lost(rng: random.Random, event: Event) -> None:
    return None


WAYS: list[Callable[[random.Random, Event], Event | None]] = [
    respell, wrong_correlation, odd_time, time_as_text, no_time, other_fields, lost,
]  # fmt: skip


QUOTES = ['a "b', '"', "\\", '"}', '"}],', 'a", "b', '\n"', "C:\\models"]
"""What torch writes into a name as it is; none leaves sound JSON."""


# -- the oracle --------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if abs(found) < 4e15 else None


def correlation(event: Event) -> int | str | None:
    value = event["args"].get("correlation")
    if value is None or isinstance(value, (bool, list)):
        return None
    try:
        found = int(value, 0) if isinstance(value, str) and "." not in value else float(value)
    except ValueError:
        return value or None  # a name
    return int(found) if found == int(found) and found >= 0 else None


def timed(event: Event) -> tuple[int, int] | None:
    start, duration = number(event.get("ts")), number(event.get("dur"))
    if start is None or duration is None or duration < 0 or start != start:
        return None
    return round(start * 1000), round(start * 1000) + round(duration * 1000)


def busy_us(events: list[Event], routers: set[int]) -> float:
    """Of all kernels whose launch lies in the block of a router that the recording placed."""
    placed = [
        t for e in events if is_range(e) and "router" in e["name"] and (t := timed(e)) and t[0] in routers
    ]
    blocks = [(start - 10_000, start + 90_000) for start, _ in placed]
    inside = {
        correlation(e)
        for e in events
        if is_launch(e) and (t := timed(e)) and any(low <= t[0] <= high for low, high in blocks)
    } - {None}
    return (
        sum(t[1] - t[0] for e in events if is_kernel(e) and correlation(e) in inside and (t := timed(e)))
        / 1000
    )


# -- the test ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_tiny(tmp_path_factory.mktemp("fuzz") / "sound.json", calls=3)
    trace: dict[str, Any] = json.loads(path.read_text())
    return trace


def read_or_refuse(path: Path) -> TraceSummary | None:
    try:
        return read_summary(path)
    except MoETraceError as error:
        assert "\n" not in str(error), "one line"
        return None


@settings(max_examples=TRIED, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.01, 0.05, 0.3, 1.0]),
    ways=st.sets(st.sampled_from(range(len(WAYS))), min_size=1, max_size=3),
    kinds=st.sampled_from([is_kernel, is_launch, is_range, lambda e: is_kernel(e) or is_launch(e)]),
    shuffled=st.booleans(),
    quotes=st.sampled_from([0, 0, 1, 5]),
)
def test_right_unknown_or_refused(
    seed: int,
    share: float,
    ways: set[int],
    kinds: Callable[[Event], bool],
    shuffled: bool,
    quotes: int,
    sound: dict[str, Any],
    tmp_path: Path,
) -> None:
    rng = random.Random(seed)
    events: list[Event] = []
    for source in sound["traceEvents"]:
        event: Event | None = {**source, "args": dict(source.get("args", {}))}
        if event is not None and kinds(event) and rng.random() < share:
            event = WAYS[rng.choice(sorted(ways))](rng, event)
        if event is not None:
            events.append(event)
    if shuffled:
        rng.shuffle(events)
    routers = {round(e["ts"] * 1000) for e in sound["traceEvents"] if is_range(e) and "router" in e["name"]}
    truth = busy_us(events, routers)
    for _ in range(quotes):  # events that nobody asks for, with a quote in their name
        at = rng.randrange(len(events) + 1)
        events.insert(at, {"ph": "i", "name": "QUOTE", "ts": 1700.0, "pid": 7, "tid": 7, "args": {}})
    path = tmp_path / "spoiled.json"
    path.write_text(json.dumps({**sound, "traceEvents": events}).replace("QUOTE", rng.choice(QUOTES)))
    read = read_or_refuse(path)
    if read is None or read.phases is None:
        return
    busy = read.phases.total.device_busy_us
    if busy is None:
        assert any("not given" in note or "could not be read" in note for note in read.notes)
        return
    assert busy == pytest.approx(truth, abs=1e-6)
    assert not quotes or any("could not be read" in note for note in read.notes)
