"""Detect the phases of an MoE layer from the structure of the operators inside its ranges.

Detection does not use the names of kernels, which differ with every device and version, but the relations
between operators, with the experts' matrix products as landmarks.

    router     the router's own range
    dispatch   in the experts: what comes before the first product (sort, gather, all-to-all), and gathers
               of rows or weights between products
    experts    from product to product: the products and the activation between them
    combine    what comes after the last product (weighting, scatter, sum, all-to-all)
    shared     products outside the router and the experts, and what is between them: shared experts
    other      the rest of the block

A loop over experts repeats dispatch, experts and combine within one call. A stretch between two products is
such a seam if it writes results back (index_add_, scatter, index_put_): up to the last such write it is
combine, after it dispatch for the next expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.data.trace_json.events import EventTable, Kind
from moe_trace.data.trace_json.intervals import Intervals, is_outermost
from moe_trace.read.time.blocks import Blocks
from moe_trace.read.time.columns import Columns

Phase = Literal["router", "dispatch", "experts", "combine", "shared", "other"]
PHASES: tuple[Phase, ...] = ("router", "dispatch", "experts", "combine", "shared", "other")
ROUTER, DISPATCH, EXPERTS, COMBINE, SHARED, OTHER = range(len(PHASES))


def _aten(*names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names)


# fmt: off
PRODUCTS = _aten(
    "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "mkldnn_linear", "_grouped_mm",
    "_scaled_mm", "_scaled_mm_v2", "_scaled_grouped_mm", "_scaled_grouped_mm_v2", "_int_mm",
    "_weight_int4pack_mm", "_weight_int8pack_mm",
)
GATHERS = _aten("index", "index_select", "gather", "take", "take_along_dim")
WRITES = _aten(
    "index_add", "index_add_", "index_put", "index_put_", "_index_put_impl_", "index_copy", "index_copy_",
    "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
)
# fmt: on
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph", "CompiledFunction")
"""Ranges around compiled code, which contain generated kernels, and operators as in eager code."""


@dataclass(frozen=True, eq=False)
class Steps(Columns, Intervals):
    """I outermost operators and launches inside blocks, sorted by thread and time. Arrays are [I]."""

    block: npt.NDArray[np.int64]
    phase: npt.NDArray[np.int64]
    """Index into `PHASES`."""
    thread: npt.NDArray[np.int64]
    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]
    name: npt.NDArray[np.int32]
    """Index into the table's names."""


def find_steps(events: EventTable, blocks: Blocks) -> Steps:
    """Find the outermost operators and launches of each block, with their phases."""
    is_compiled_range = np.array([name.startswith(_COMPILED) for name in events.names], bool)
    host = events.select((events.kind == Kind.OP) | (events.kind == Kind.LAUNCH))
    if is_compiled_range.any():
        host = host.select(~is_compiled_range[host.name])
    host = host.select(np.lexsort((-host.duration_ns, host.start_ns, host.thread)))
    block = blocks.at(host.thread, host.start_ns, host.end_ns)
    inside = block >= 0
    host, block = host.select(inside), block[inside]
    outermost = is_outermost(host, block)
    step = np.cumsum(outermost) - 1
    products, writes = _contains_name(host, step, PRODUCTS), _contains_name(host, step, WRITES)
    steps, block = host.select(outermost), block[outermost]
    return Steps(
        block=block,
        phase=_phases(blocks, block, steps.start_ns, products, _has_name(steps, GATHERS), writes),
        thread=steps.thread.astype(np.int64),
        start_ns=steps.start_ns,
        end_ns=steps.end_ns,
        name=steps.name,
    )


def _has_name(host: EventTable, names: frozenset[str]) -> npt.NDArray[np.bool_]:
    matches = np.array([name in names for name in host.names], dtype=bool)
    return matches[host.name] if len(matches) else np.zeros(len(host), dtype=bool)


def _contains_name(host: EventTable, step: npt.NDArray, names: frozenset[str]) -> npt.NDArray[np.bool_]:
    """Return whether the outermost row, or a row inside it, has one of the names."""
    holding = np.zeros(int(step[-1]) + 1 if len(step) else 0, dtype=bool)
    holding[step[_has_name(host, names)]] = True
    return holding


def _phases(
    blocks: Blocks,
    block: npt.NDArray,
    start_ns: npt.NDArray,
    products: npt.NDArray[np.bool_],
    gathers: npt.NDArray[np.bool_],
    writes: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    router, experts = blocks.router_ns[block], blocks.experts_ns[block]
    phase = phases_of_ranges(blocks, block, start_ns)
    rows = np.flatnonzero(phase == EXPERTS)
    phase[rows] = phases_in_experts(block[rows], products[rows], gathers[rows], writes[rows])
    rows = np.flatnonzero(phase == OTHER)
    before = (start_ns < router[:, 0]).astype(np.int64) + (start_ns < experts[:, 0])
    phase[rows[between_products((block * 3 + before)[rows], products[rows])]] = SHARED
    return phase


def between_products(group: npt.NDArray, products: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return whether a row is between the first and the last product of its group, both included."""
    _, group = np.unique(group, return_inverse=True)
    first, last = _first_and_last(group, products)
    position = np.arange(len(group))
    return (position >= first[group]) & (position <= last[group])


def phases_of_ranges(
    blocks: Blocks, block: npt.NDArray[np.int64], start_ns: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return router or experts if the operation began in that range of its block, else other."""
    router, experts = blocks.router_ns[block], blocks.experts_ns[block]
    phase = np.full(len(block), OTHER, dtype=np.int64)
    phase[(start_ns >= experts[:, 0]) & (start_ns < experts[:, 1])] = EXPERTS
    phase[(start_ns >= router[:, 0]) & (start_ns < router[:, 1])] = ROUTER
    return phase


def phases_in_experts(
    block: npt.NDArray,
    products: npt.NDArray[np.bool_],
    gathers: npt.NDArray[np.bool_],
    writes: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    if not len(block):
        return np.zeros(0, dtype=np.int64)
    _, call = np.unique(block, return_inverse=True)
    position = np.arange(len(block))
    first, last = _first_and_last(call, products)
    known = np.bincount(call[products], minlength=len(first)) > 0
    phase = np.full(len(block), EXPERTS, dtype=np.int64)
    phase[known[call] & (position < first[call])] = DISPATCH
    phase[known[call] & (position > last[call])] = COMBINE
    between = known[call] & ~products & (position > first[call]) & (position < last[call])
    # Stretches between products are distinguished by the number of earlier products.
    stretch = np.cumsum(products)
    last_write = np.full(int(stretch[-1]) + 1, -1, dtype=np.int64)
    np.maximum.at(last_write, stretch[between & writes], position[between & writes])
    seam = between & (last_write[stretch] >= 0)
    phase[seam] = np.where(position <= last_write[stretch], COMBINE, DISPATCH)[seam]
    phase[between & ~seam & gathers] = DISPATCH
    return phase


def _first_and_last(group: npt.NDArray, marked: npt.NDArray[np.bool_]) -> tuple[npt.NDArray, npt.NDArray]:
    """Return positions of the first and last marked row of each group; the interval is empty without any."""
    groups = int(group.max()) + 1 if len(group) else 0
    position = np.flatnonzero(marked)
    first = np.full(groups, len(group), dtype=np.int64)
    last = np.full(groups, -1, dtype=np.int64)
    np.minimum.at(first, group[position], position)
    np.maximum.at(last, group[position], position)
    return first, last
