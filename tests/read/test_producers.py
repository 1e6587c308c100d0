"""The table of producers in docs/reading.md, row by row, against plain loops over each row's trace."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moe_trace.read.reader import TraceSummary, read_summary
from paths import DATA, ROOT
from spelled import SPELLINGS

Event = dict[str, Any]
FOLDER = DATA / "producers"
LINES = (
    (ROOT / "docs" / "reading.md").read_text(encoding="utf-8").split("\n## Producers\n")[1].split("\n## ")[0]
)


@dataclass(frozen=True)
class Row:
    """What the table says of a producer."""

    file: Path
    launches: frozenset[str]
    work: frozenset[str]


def rows() -> dict[str, Row]:
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in LINES.splitlines()
        if line.startswith("|")
    ]
    named = {}
    for name, launches, work, example in table[2:]:
        names = [
            frozenset(part for i, part in enumerate(cell.split("`")) if i % 2) for cell in (launches, work)
        ]
        named[name] = Row(ROOT / example.split("`")[1], *names)
    return named


TABLE = rows()
JOINED = ["CUDA", "ROCm", "XPU", "MTIA", "PrivateUse1"]


@dataclass
class Truth:
    """Sums in nanoseconds over one file."""

    busy: int = 0
    router: int = 0
    kernels: int = 0
    joined: list[int] = field(default_factory=list)
    all: list[int] = field(default_factory=list)


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def ns(us: float) -> int:
    return round(us * 1000)


def truth_of(row: Row, trace: dict[str, Any]) -> Truth:
    """Every device event against every launch, every launch against every range."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    ranges = [e for e in events if e.get("cat") == "user_annotation"]
    launches: dict[int, list[Event]] = {}
    for e in events:
        if e.get("cat") in row.launches and "correlation" in e.get("args", {}):
            launches.setdefault(e["args"]["correlation"], []).append(e)
    truth = Truth()

    def launched_in(kind: str, correlation: int) -> bool:
        return any(
            r["name"].startswith(f"moe.{kind}/")
            and (r["pid"], r["tid"]) == (launch["pid"], launch["tid"])
            and r["ts"] <= launch["ts"] <= r["ts"] + r["dur"]
            for launch in launches[correlation]
            for r in ranges
        )

    for e in events:
        if e.get("cat") not in row.work or (e["cat"] in row.launches and "correlation" in e.get("args", {})):
            continue
        truth.all.append(ns(e["dur"]))
        correlation = e.get("args", {}).get("correlation")
        if correlation not in launches:
            continue
        truth.joined.append(ns(e["dur"]))
        if launched_in("block", correlation):
            truth.busy += ns(e["dur"])
            truth.kernels += 1
        if launched_in("router", correlation):
            truth.router += ns(e["dur"])
    return truth


def test_every_row_has_a_trace_with_what_it_names() -> None:
    assert list(TABLE) == ["CUDA", "ROCm", "XPU", "MTIA", "PrivateUse1", "HPU", "CPU"]
    for name, row in TABLE.items():
        found = {e.get("cat") for e in load(row.file)["traceEvents"]}
        assert row.launches <= found and row.work <= found, name


def same_as(truth: Truth, read: TraceSummary) -> None:
    assert read.phases is not None and read.times is not None
    assert ns(read.phases.total.device_busy_us or 0) == truth.busy > 0
    assert sum(part.kernels or 0 for part in read.phases.total.forward.values()) == truth.kernels
    assert sum(map(ns, read.busy_us.values())) == truth.router > 0
    kernels = read.times.coverage.kernels
    assert (kernels.joined, kernels.total) == (len(truth.joined), len(truth.all))
    assert (kernels.joined_ns, kernels.total_ns) == (sum(truth.joined), sum(truth.all))


@pytest.mark.parametrize("producer", JOINED)
def test_device_time_is_that_of_the_file(producer: str) -> None:
    row = TABLE[producer]
    same_as(truth_of(row, load(row.file)), read_summary(row.file))


def test_work_without_a_correlation_is_counted() -> None:
    """A control processor's own packets on MTIA: few enough, so sums are given, with their coverage."""
    read = read_summary(TABLE["MTIA"].file)
    assert read.times is not None and 0.9 <= (read.times.coverage.kernels.share or 0) < 1
    assert any("have a launch" in note for note in read.notes)


@pytest.mark.parametrize(
    "spelling", ["floats", "texts", "hex", "names", "beyond 64 bits signed", "float threads"]
)
@pytest.mark.parametrize("producer", JOINED)
def test_in_any_spelling(producer: str, spelling: str, tmp_path: Path) -> None:
    row = TABLE[producer]
    trace = load(row.file)
    truth = truth_of(row, trace)
    spell: Callable[[Event], Event] = SPELLINGS[spelling]
    path = tmp_path / "a.pt.trace.json"
    path.write_text(json.dumps({**trace, "traceEvents": [spell(dict(e)) for e in trace["traceEvents"]]}))
    same_as(truth, read_summary(path))


def test_what_gaudi_launches_is_unknown_and_never_zero() -> None:
    """Its bridge says of no work what launched it; matrix products are `hpu_op`, as calls on the host are."""
    row = TABLE["HPU"]
    truth, read = truth_of(row, load(row.file)), read_summary(row.file)
    assert read.phases is not None and read.times is not None
    assert not truth.joined and len(truth.all) == read.times.coverage.kernels.total
    assert read.phases.total.device_busy_us is None and read.phases.whole.moe_work_us is None
    assert read.busy_us == {}
    assert any("not given" in note for note in read.notes)


def test_on_a_cpu_operators_are_the_work() -> None:
    row = TABLE["CPU"]
    trace, read = load(row.file), read_summary(row.file)
    slices = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    ops = [e for e in slices if e.get("cat") in row.work]

    def within(inner: Event, outer: Event) -> bool:
        return (
            inner is not outer
            and (inner["pid"], inner["tid"]) == (outer["pid"], outer["tid"])
            and ns(outer["ts"]) <= ns(inner["ts"])
            and ns(inner["ts"]) + ns(inner["dur"]) <= ns(outer["ts"]) + ns(outer["dur"])
        )

    total = 0
    for block in (
        e for e in slices if e.get("cat") == "user_annotation" and e["name"].startswith("moe.block/")
    ):
        inside = [e for e in ops if within(e, block)]
        total += sum(ns(e["dur"]) for e in inside if not any(within(e, outer) for outer in inside))
    assert read.phases is not None
    assert ns(read.phases.whole.moe_work_us or 0) == total > 0
    assert read.phases.total.device_busy_us is None
