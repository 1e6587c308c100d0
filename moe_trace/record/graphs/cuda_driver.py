"""The few calls of CUDA's driver about captures that torch has no names for.

By ctypes: these symbols keep their form from one release of the driver to the next, and every process that
uses CUDA has loaded it.
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
    """The driver cannot tell; never leaves this package."""


@dataclass(frozen=True)
class CaptureState:
    """Where a capture stands."""

    id: int
    graph: int
    frontier: tuple[int, ...]
    """Nodes that the next one of the stream will depend on."""


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
    """Let this thread allocate while a stream captures; it has the mode from before again afterwards.

    Without the driver nothing is changed: memory that torch's cache holds can still be had.
    """
    mode = ctypes.c_int(_RELAXED)
    try:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # now it is the one from before
    except DriverError:
        yield
        return
    try:
        yield
    finally:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def capture_state(stream: int) -> CaptureState:
    """The capture that a stream takes part in.

    Raises:
        DriverError: it takes part in none, or the driver is older than CUDA 12.3.
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
    """All nodes so far."""
    count = ctypes.c_size_t()
    _call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    if count.value:
        _call("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(count))
    return [int(node or 0) for node in nodes]


def node_dependencies(node: int) -> list[int]:
    """The nodes that a node waits for."""
    count, none = ctypes.c_size_t(), ctypes.c_void_p()
    _call("cuGraphNodeGetDependencies_v2", ctypes.c_void_p(node), none, none, ctypes.byref(count))
    if not count.value:
        return []
    nodes, edges = (ctypes.c_void_p * count.value)(), (_EdgeData * count.value)()
    _call("cuGraphNodeGetDependencies_v2", ctypes.c_void_p(node), nodes, edges, ctypes.byref(count))
    return [int(found or 0) for found in nodes]


def node_type(node: int) -> int:
    """Its CUgraphNodeType."""
    kind = ctypes.c_int()
    _call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
    return kind.value


def kernel_shape(node: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block of a kernel's node."""
    params = _KernelParams()
    _call("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(params))
    return tuple(params.grid), tuple(params.block)
