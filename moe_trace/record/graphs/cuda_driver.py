"""CUDA driver calls about stream captures that torch does not expose.

They are called through ctypes: the signatures of these symbols are stable across driver releases, and every
process that uses CUDA has loaded the library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
# CUgraphNodeType
KERNEL, MEMCPY, MEMSET = 0, 1, 2
WITHOUT_WORK = frozenset({3, 5, 6, 7, 10, 11})  # host, empty, wait, record, allocate, free


class DriverError(Exception):
    """Failure of a driver call; never raised out of this package."""


@dataclass(frozen=True)
class CaptureState:
    """State of a capture in progress."""

    id: int
    graph: int
    frontier: tuple[int, ...]
    """Nodes that the next node of the stream will depend on."""


class _EdgeData(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 8),)


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@cache
def _driver() -> Any:
    if torch.version.cuda is None:
        raise DriverError("this torch is not built for CUDA")
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DriverError("CUDA's driver library was not found")


def _call(name: str, *arguments: Any) -> None:
    try:
        function = getattr(_driver(), name)
    except AttributeError:
        raise DriverError(f"CUDA's driver has no {name}") from None
    code = function(*arguments)
    if code != 0:
        raise DriverError(f"{name} returned error {code}")


@contextmanager
def relaxed_capture_mode() -> Iterator[None]:
    """Let this thread allocate memory while a stream captures, and restore its capture mode afterwards.

    Without the driver nothing is changed: memory that torch's allocator has cached is still available.
    """
    mode = ctypes.c_int(_RELAXED)
    try:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # `mode` now holds the previous one
    except DriverError:
        yield
        return
    try:
        yield
    finally:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def capture_state(stream: int) -> CaptureState:
    """Return the state of the capture that a stream takes part in.

    Raises:
        DriverError: the stream is not being captured, or the driver is older than CUDA 12.3.
    """
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    graph, count = ctypes.c_void_p(), ctypes.c_size_t()
    nodes, edges = ctypes.POINTER(ctypes.c_void_p)(), ctypes.POINTER(_EdgeData)()
    out = (status, number, graph, nodes, edges, count)
    _call("cuStreamGetCaptureInfo_v3", ctypes.c_void_p(stream), *map(ctypes.byref, out))
    if status.value != _ACTIVE or not graph.value:
        raise DriverError("the stream is not being captured")
    frontier = tuple(int(nodes[i] or 0) for i in range(count.value))
    return CaptureState(number.value, graph.value, frontier)


def graph_nodes(graph: int) -> list[int]:
    """Return all nodes of a graph so far."""
    count = ctypes.c_size_t()
    _call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    if count.value:
        _call("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(count))
    return [int(node or 0) for node in nodes]


def node_dependencies(node: int) -> list[int]:
    """Return the nodes that a node depends on."""
    count, none = ctypes.c_size_t(), ctypes.c_void_p()
    _call("cuGraphNodeGetDependencies_v2", ctypes.c_void_p(node), none, none, ctypes.byref(count))
    if not count.value:
        return []
    nodes, edges = (ctypes.c_void_p * count.value)(), (_EdgeData * count.value)()
    _call("cuGraphNodeGetDependencies_v2", ctypes.c_void_p(node), nodes, edges, ctypes.byref(count))
    return [int(found or 0) for found in nodes]


def node_type(node: int) -> int:
    """Return the CUgraphNodeType of a node."""
    kind = ctypes.c_int()
    _call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
    return kind.value


def kernel_shape(node: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the grid and block dimensions of a kernel node."""
    params = _KernelParams()
    _call("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(params))
    return tuple(params.grid), tuple(params.block)
