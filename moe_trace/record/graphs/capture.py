"""Positions of routers and experts in CUDA graphs that are captured by hand.

While a stream is captured, the hooks run in Python, once. They record how many nodes the graph had when a
router or its experts began and ended, and annotate these nodes for the profiler where torch supports it
(`torch.cuda.graph(enable_annotations=True)`). The kernels of a replay are identified when a trace is merged
(`timeline/correlate/replays.py`). Nothing here raises: a graph whose nodes cannot be identified keeps the
reason.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_trace.data.schema import CapturedGraph, GraphCall, RangeKind, graph_digest, range_name
from moe_trace.find.private.torch_names import kernel_annotations, mark_kernels
from moe_trace.record.graphs import cuda_driver
from moe_trace.record.graphs.cuda_driver import DriverError

NOT_A_CHAIN = "the captured graph is no plain chain, so its kernels may run in another order each time"
_CAPTURES_MAX = 1000
_UNKNOWN = -1  # id of all captures that the driver cannot identify
_ANNOTATION, _OWNER = "moe_trace", "moe_tracer"


@dataclass
class _Capture:
    """One graph, up to the last time it was read."""

    nodes: list[str | None] = field(default_factory=list)
    """Nodes that do work: grid and block of each kernel, None for copies and memsets."""
    calls: list[GraphCall] = field(default_factory=list)
    seen: int = 0
    """Number of nodes read."""
    last: int | None = None
    """The last node read."""
    problem: str | None = None

    def read(self, state: cuda_driver.CaptureState) -> None:
        """Read the new nodes, each of which must depend on the previous one only."""
        if self.problem is not None:
            return
        for node in cuda_driver.graph_nodes(state.graph)[self.seen :]:
            if cuda_driver.node_dependencies(node) != ([] if self.last is None else [self.last]):
                self.problem = NOT_A_CHAIN
                return
            self._add(node)
        if state.frontier != (() if self.last is None else (self.last,)):
            self.problem = NOT_A_CHAIN

    def _add(self, node: int) -> None:
        kind = cuda_driver.node_type(node)
        if kind == cuda_driver.KERNEL:
            grid, block = (",".join(map(str, shape)) for shape in cuda_driver.kernel_shape(node))
            self.nodes.append(f"{grid} {block}")
        elif kind in (cuda_driver.MEMCPY, cuda_driver.MEMSET):
            self.nodes.append(None)
        elif kind not in cuda_driver.WITHOUT_WORK:
            self.problem = f"the captured graph holds a node of type {kind}, whose kernels are not known"
        self.seen += 1
        self.last = node


@dataclass
class _Open:
    """A call of a router or of its experts that is in progress in a capture."""

    capture: _Capture
    first: int
    annotation: AbstractContextManager[Any] | None


class CaptureNotes:
    """The captures that one tracer has seen, and the calls in them."""

    def __init__(self) -> None:
        self._captures: dict[int, _Capture] = {}
        self._open: dict[tuple[int, str, RangeKind], _Open] = {}

    def begin(self, name: str, site: str, kind: RangeKind) -> None:
        """Record the start of a router or its experts; the current stream must be capturing."""
        capture = self._read()
        annotation = _annotate(range_name(kind, site), id(self))
        self._open[threading.get_ident(), name, kind] = _Open(capture, len(capture.nodes), annotation)

    def end(self, name: str, kind: RangeKind) -> None:
        """Record that a router or its experts returned or raised."""
        opened = self._open.pop((threading.get_ident(), name, kind), None)
        if opened is None:
            return
        if opened.annotation is not None:
            try:
                opened.annotation.__exit__(None, None, None)
            except Exception as error:  # a private API of torch must not break the user's capture
                opened.capture.problem = f"torch's annotations failed ({type(error).__name__}: {error})"
        capture = self._read()
        if capture is opened.capture and len(capture.nodes) > opened.first:
            capture.calls.append(GraphCall(name=name, kind=kind, first=opened.first, last=len(capture.nodes)))

    def _read(self) -> _Capture:
        """Return the capture in progress, read up to its last node."""
        try:
            state = cuda_driver.capture_state(torch.cuda.current_stream().cuda_stream)
        except DriverError as error:
            unknown = self._captures.setdefault(_UNKNOWN, _Capture())
            unknown.problem = _driver_problem(error)
            return unknown
        if len(self._captures) >= _CAPTURES_MAX and state.id not in self._captures:
            del self._captures[next(iter(self._captures))]
        capture = self._captures.setdefault(state.id, _Capture())
        try:
            capture.read(state)
        except DriverError as error:
            capture.problem = _driver_problem(error)
        return capture

    def graphs(self) -> tuple[CapturedGraph, ...]:
        """Return all captured graphs."""
        return tuple(_captured(capture) for capture in self._captures.values())

    def annotated_nodes(self) -> dict[str, tuple[int, ...]]:
        """Return the ids of the nodes that torch annotated for this tracer, by range name."""
        found: dict[str, list[int]] = {}
        for node, entries in kernel_annotations().items() if self._captures else ():
            for entry in entries:
                if isinstance(entry, dict) and entry.get(_OWNER) == id(self):
                    found.setdefault(entry[_ANNOTATION], []).append(int(node))
        return {label: tuple(nodes) for label, nodes in found.items()}


def _driver_problem(error: DriverError) -> str:
    return f"CUDA's driver does not tell the nodes of a capture: {error}"


def _captured(capture: _Capture) -> CapturedGraph:
    nodes = capture.nodes[: max((call.last for call in capture.calls), default=0)]
    return CapturedGraph(
        nodes=len(nodes),
        digest=graph_digest(node for node in nodes if node is not None),
        calls=tuple(capture.calls),
        copies=tuple(i for i, node in enumerate(nodes) if node is None),
        problem=capture.problem,
    )


def _annotate(label: str, owner: int) -> AbstractContextManager[Any] | None:
    try:
        scope = mark_kernels({_ANNOTATION: label, _OWNER: owner})
        if scope is not None:
            scope.__enter__()
    except Exception:  # without annotations, nodes are identified by their positions
        return None
    return scope
