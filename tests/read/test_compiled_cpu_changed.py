"""Tests of altered calls of CPU-compiled code in real traces: each operator gets its true phase or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_trace.data.compiled_graph import CompiledGraph, decode_compiled, encode_compiled
from moe_trace.data.trace_json.events import EventTable, Kind
from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.read.file.trace_file import TraceFile, read_trace
from moe_trace.timeline.correlate.compiled_calls import join_compiled, key_of
from paths import ROOT

FOLDER = ROOT / "tests" / "data" / "cpu_compiled"
NAMES = sorted(file.name.split(".")[0] for file in FOLDER.iterdir())
STRANGE = ["another::operator", "another_kernel"]
Told = dict[tuple[str, int], set[Any]]
"""Of each pass of each router call, the operators that are said to be its own: when, how long, what for."""


@dataclass(frozen=True)
class Operator:
    """One right inside a call of a compiled graph."""

    name: str
    start_ns: int
    duration_ns: int
    row: int
    """In the table of events; -1 for one that was added."""


@cache
def recorded(name: str) -> TraceFile:
    return read_trace(FOLDER / f"{name}.pt.trace.json.gz")


@cache
def calls_of(name: str) -> tuple[tuple[Operator, ...], ...]:
    """What stands right inside each call of a compiled graph, by a plain reading."""
    events = recorded(name).events
    rows = np.flatnonzero(events.kind == Kind.OP).tolist()
    rows.sort(key=lambda row: (events.start_ns[row], -events.duration_ns[row]))
    names, start, end = [events.names[i] for i in events.name], events.start_ns, events.end_ns
    found = []
    for call in [row for row in rows if names[row].startswith("## Call CompiledFxGraph")]:
        inside: list[int] = []
        for row in rows:
            mine = events.thread[row] == events.thread[call] and row != call
            within = start[call] <= start[row] and end[row] <= end[call]
            if mine and within and (not inside or start[row] >= end[inside[-1]]):
                inside.append(row)
        found.append(
            tuple(Operator(names[row], int(start[row]), int(end[row] - start[row]), row) for row in inside)
        )
    return tuple(found)


def python_runs(call: Sequence[Operator]) -> list[list[Operator]]:
    """What grouped products that are written in Python call where they do not show: zeros and the rest."""
    runs: list[list[Operator]] = []
    running = False
    for one in call:
        begins = not running and one.name.startswith("aten::zeros")
        running = (running or begins) and "_cpp_" not in one.name
        runs += [[]] if begins else []
        if running:
            runs[-1].append(one)
    return runs


def told(name: str, events: EventTable, graphs: Sequence[CompiledGraph] = ()) -> Told:
    recording = recorded(name).recording
    graphs = graphs or recording.compiled_graphs
    join = join_compiled(recording.calls, graphs, events, find_kernels(events))
    assert join is not None
    found: Told = defaultdict(set)
    for part, work in (("forward", join.forward()), ("backward", join.backward())):
        for one in work:
            start, duration = join.kernels.start_ns[one.kernel], join.kernels.duration_ns[one.kernel]
            found[part, one.call].add((int(start), int(duration), one.place, one.share, one.launch.product))
    return dict(found)


@cache
def truth(name: str) -> Told:
    return told(name, recorded(name).events)


def with_calls(name: str, changed: list[list[Operator]]) -> EventTable:
    """The events with other operators in the calls of graphs; what is dropped takes what it called along."""
    events = recorded(name).events
    before, after = ([one for call in calls for one in call] for calls in (calls_of(name), changed))
    names = list(dict.fromkeys([*events.names, *(one.name for one in after)]))
    renamed, keep = events.name.copy(), np.ones(len(events), bool)
    for one in after:
        if one.row >= 0:
            renamed[one.row] = names.index(one.name)
    kept = {one.row for one in after}
    for one in before:
        if one.row not in kept:
            inside = (one.start_ns <= events.start_ns) & (events.end_ns <= one.start_ns + one.duration_ns)
            keep &= ~(inside & (events.kind == Kind.OP) & (events.thread == events.thread[one.row]))
    added = [one for one in after if one.row < 0]
    index = np.concatenate([np.flatnonzero(keep), np.full(len(added), before[0].row)])
    table = replace(events, name=renamed, names=tuple(names)).select(index)
    if added:
        table.name[-len(added) :] = [names.index(one.name) for one in added]
        table.start_ns[-len(added) :] = [one.start_ns for one in added]
        table.duration_ns[-len(added) :] = [one.duration_ns for one in added]
    return table


def change(call: list[Operator], at: int, other: int, kind: str, name: str) -> None:
    """One operator of a call becomes another, goes, comes, or stands where another stood."""
    one = call[at]
    if kind == "rename":
        call[at] = replace(one, name=name)
    elif kind == "drop":
        del call[at]
    elif kind == "add":
        before = call[at - 1] if at else one
        start = before.start_ns + before.duration_ns + 1 if at else one.start_ns - 2
        assume(not at or start + 1 < one.start_ns)
        call.insert(at, Operator(name, start, 1, -1))
    else:
        call[at], call[other] = replace(one, name=call[other].name), replace(call[other], name=one.name)


def names_in(call: Any) -> list[str]:
    return [one.name for one in call]


@pytest.mark.parametrize("name", NAMES)
def test_operators_that_are_not_changed_are_all_told(name: str) -> None:
    rows = {row for _, row in truth(name)}
    assert len(rows) == 6
    assert with_calls(name, [[*call] for call in calls_of(name)]).names == recorded(name).events.names
    passes = 2 if "training" in name else 1
    assert len(truth(name)) == passes * 6


def test_products_in_python_are_what_they_call_and_nothing_else() -> None:
    name = "without_graphs_torch_2_14"
    runs = [run for call in calls_of(name) for run in python_runs(call)]
    assert len(runs) == 3 * 2 * 2 and all(len(run) > 9 for run in runs)
    products = {(start, ns) for work in truth(name).values() for start, ns, *_, product in work if product}
    mine = {(one.start_ns, one.duration_ns) for run in runs for one in run}
    routers = {
        (one.start_ns, one.duration_ns) for call in calls_of(name) for one in call if one.name == "aten::mm"
    }
    assert mine <= products <= mine | routers and len(products - mine) == 3 * 2


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_calls_are_told_right_or_not_at_all(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    calls = calls_of(name)
    one = data.draw(st.integers(0, len(calls) - 1))
    alike = [i for i, call in enumerate(calls) if names_in(call) == names_in(calls[one])]
    places = alike if data.draw(st.booleans()) else [one]
    changed = [[*call] for call in calls]
    python = {one for call in calls for run in python_runs(call) for one in run}  # any number of any
    names = [*dict.fromkeys(names_in(calls[one])), *STRANGE]
    for _ in range(data.draw(st.integers(1, 3))):
        size = min(len(changed[i]) for i in places)
        assume(size > 1)
        at, other = (data.draw(st.integers(0, size - 1)) for _ in range(2))
        kind = data.draw(st.sampled_from(["rename", "drop", "add", "swap"]))
        text = data.draw(st.sampled_from(names))
        for i in places:
            assume(python.isdisjoint((changed[i][at], changed[i][other], *changed[i][max(0, at - 1) : at])))
            change(changed[i], at, other, kind, text)
    broken = [i for i in places if names_in(changed[i]) != names_in(calls[i])]
    assume(broken or all([*a] == b for a, b in zip(calls, changed, strict=True)))
    lost = {operator.start_ns for i in broken for operator in calls[i]}
    expected = truth(name)
    unknown = {key for key, work in expected.items() if any(start in lost for start, *_ in work)}
    found = told(name, with_calls(name, changed))
    assert not unknown & set(found)
    assert all(work == expected[key] for key, work in found.items())
    if len(places) == 1:  # a run of shared code is a layer's by its number among those of its forward
        steps = recorded(name).recording.calls.step
        forwards = {steps[row] for part, row in unknown if part == "forward"}
        unknown |= {(part, row) for part, row in expected if steps[row] in forwards}
        assert set(found) == set(expected) - unknown, "what was not changed goes on being told"


def test_graphs_of_the_same_kernels_are_told_apart_by_the_key_of_the_call() -> None:
    trace = recorded("without_graphs")
    [graph] = trace.recording.compiled_graphs
    [name] = {text for text in trace.events.names if text.startswith("## Call CompiledFxGraph")}
    mine, key = name.split()[3], "fanotherkey"
    other = replace(graph, parts=graph.parts[::-1])

    def told_with(*keys: str) -> Told:
        graphs = [replace(one, key=key) for one, key in zip((graph, other), keys, strict=False)]
        assert decode_compiled(encode_compiled(graphs)) == tuple(graphs)
        return told("without_graphs", trace.events, graphs)

    assert told_with(mine, key) == told_with(mine) == told_with("") == truth("without_graphs")
    assert told_with("", "") == told_with(mine, mine) == told_with(key) == {}
    assert told_with(key, mine) not in ({}, truth("without_graphs"))


@pytest.mark.parametrize(("call", "key"), [("fabc", "fabc"), ("None", "")])
def test_a_call_has_the_key_that_its_name_tells(call: str, key: str) -> None:
    assert key_of(f"## Call CompiledFxGraph {call} ##") == key
