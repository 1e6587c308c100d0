"""Tests of what hooks record during CUDA graph capture, with a fake driver that keeps the graph in Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from moe_trace.data.schema import GraphCall, graph_digest
from moe_trace.record.graphs import cuda_driver
from moe_trace.record.graphs.capture import NOT_A_CHAIN, CaptureNotes
from moe_trace.record.graphs.cuda_driver import CaptureState, DriverError


@dataclass
class Driver:
    """Graphs as lists of nodes: (type, grid, what it waits for). Node i has the handle 100 + i."""

    id: int = 1
    nodes: list[tuple[int, int, list[int]]] = field(default_factory=list)
    frontier: list[int] = field(default_factory=list)
    failing: str | None = None

    def launch(self, count: int = 1, *, kind: int = cuda_driver.KERNEL, grid: int = 1) -> None:
        """Work on the stream that is captured."""
        for _ in range(count):
            self.nodes.append((kind, grid, self.frontier))
            self.frontier = [100 + len(self.nodes) - 1]

    def capture_state(self, stream: int) -> CaptureState:
        if self.failing == "state":
            raise DriverError("the driver is too old")
        return CaptureState(self.id, self.id, tuple(self.frontier))

    def graph_nodes(self, graph: int) -> list[int]:
        if self.failing == "nodes":
            raise DriverError("no nodes")
        return [100 + i for i in range(len(self.nodes))]

    def node_dependencies(self, node: int) -> list[int]:
        return self.nodes[node - 100][2]

    def node_type(self, node: int) -> int:
        return self.nodes[node - 100][0]

    def kernel_shape(self, node: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.nodes[node - 100][1], 1, 1), (128, 1, 1)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    for name in ("capture_state", "graph_nodes", "node_dependencies", "node_type", "kernel_shape"):
        monkeypatch.setattr(cuda_driver, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 5}))
    yield made


def capture(driver: Driver, notes: CaptureNotes) -> None:
    """Two kernels, a router of three with a copy, an allocation, experts of two, one more kernel."""
    driver.launch(2)
    notes.begin("a.gate", "L00", "router")
    driver.launch(2, grid=7)
    driver.launch(kind=cuda_driver.MEMCPY)
    notes.end("a.gate", "router")
    driver.launch(kind=10)
    notes.begin("a.gate", "L00", "experts")
    driver.launch(2, grid=9)
    notes.end("a.gate", "experts")
    driver.launch()


KERNELS = ["1,1,1 128,1,1"] * 2 + ["7,1,1 128,1,1"] * 2 + ["9,1,1 128,1,1"] * 2


def test_calls_are_noted_by_their_nodes(driver: Driver) -> None:
    notes = CaptureNotes()
    capture(driver, notes)
    (graph,) = notes.graphs()
    assert graph.problem is None
    assert (graph.nodes, graph.copies, graph.digest) == (7, (4,), graph_digest(KERNELS))
    assert graph.calls == (
        GraphCall(name="a.gate", kind="router", first=2, last=5),
        GraphCall(name="a.gate", kind="experts", first=5, last=7),
    )


def test_each_capture_has_its_own_notes(driver: Driver) -> None:
    notes = CaptureNotes()
    capture(driver, notes)
    driver.id, driver.nodes, driver.frontier = 2, [], []
    capture(driver, notes)
    one, two = notes.graphs()
    assert one == two


@pytest.mark.parametrize("fork", ["before", "inside"])
def test_a_fork_is_no_chain(driver: Driver, fork: str) -> None:
    notes = CaptureNotes()
    if fork == "before":
        driver.launch()
        driver.frontier = [*driver.frontier, 100]
    else:
        driver.launch(2)
        driver.nodes.append((cuda_driver.KERNEL, 1, [100]))  # another stream goes on from the first
    capture(driver, notes)
    assert [graph.problem for graph in notes.graphs()] == [NOT_A_CHAIN]


@pytest.mark.parametrize("failing", ["state", "nodes"])
def test_a_driver_that_cannot_tell_leaves_its_reason(driver: Driver, failing: str) -> None:
    driver.failing = failing
    notes = CaptureNotes()
    capture(driver, notes)
    (graph,) = notes.graphs()
    assert graph.problem is not None and "CUDA's driver does not tell" in graph.problem


def test_an_unknown_node_is_a_problem(driver: Driver) -> None:
    notes = CaptureNotes()
    driver.launch(kind=4)
    capture(driver, notes)
    assert "type 4" in str(notes.graphs()[0].problem)


def test_a_router_that_does_not_return_is_not_noted(driver: Driver) -> None:
    notes = CaptureNotes()
    notes.begin("a.gate", "L00", "router")
    driver.launch()
    notes.end("b.gate", "router")
    assert [graph.calls for graph in notes.graphs()] == [()]


def test_without_a_gpu_the_driver_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DriverError):
        cuda_driver.capture_state(0)
    with cuda_driver.relaxed_capture_mode():
        pass


def test_annotations_are_told_from_those_of_others(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch keeps them once a graph was captured with `enable_annotations=True`."""
    annotations = pytest.importorskip(
        "torch.cuda._graph_annotations", reason="older torch keeps no such notes"
    )
    notes, other = CaptureNotes(), CaptureNotes()
    capture(driver, notes)
    kept = {
        (7 << 32) | 1: [{"moe_trace": "moe.router/L00", "moe_tracer": id(notes)}],
        (7 << 32) | 2: [{"moe_trace": "moe.router/L00", "moe_tracer": id(notes), "str": "theirs"}],
        (7 << 32) | 3: [{"moe_trace": "moe.router/L00", "moe_tracer": id(other)}, {"str": "theirs"}],
    }
    monkeypatch.setattr(annotations, "_kernel_annotations", kept)
    assert notes.annotated_nodes() == {"moe.router/L00": ((7 << 32) | 1, (7 << 32) | 2)}
