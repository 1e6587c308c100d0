"""A `Recording` to and from the JSON that stands under the trace's `moe_trace` key.

Samples are written column by column: sixteen layers of a thousand steps share their field names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import msgspec
import numpy as np

from moe_trace.data.errors import SchemaError, TraceFileError
from moe_trace.data.schema import (
    RANGE_KINDS,
    SCHEMA_VERSION,
    CapturedGraph,
    GraphMark,
    Lost,
    Parallel,
    Placement,
    RangeKind,
    Recording,
    RouterInfo,
    RoutingSample,
    Span,
)

_SITE_FIELDS = ("site", "name", "layer")  # stored once, in the router table
_ARRAYS = ("assignments", "k_histogram", "dispatched")
_PLAIN = tuple(f.name for f in fields(RoutingSample) if f.name not in (*_SITE_FIELDS, *_ARRAYS, "placement"))
# Columns that older files do not have.
_LATER: dict[str, Any] = {
    "aux_loss": None,
    "in_graph": False,
    "dispatched": None,
    "slot_bytes": None,
    "graph_forward": None,
}
_RANKS_MAX = 1 << 20
"""Of no run; a file that says more was changed, and would be counted through for ever."""
_FIRST_KINDS = 3  # of a placement; older files know no others


def encode_recording(recording: Recording, **extra: Any) -> bytes:
    """One line of JSON; `extra` keys are added at its top level."""
    index = {router.name: i for i, router in enumerate(recording.routers)}
    samples = recording.samples
    columns: dict[str, list[Any]] = {"router": [index[s.name] for s in samples]}
    columns |= {name: [getattr(s, name) for s in samples] for name in _PLAIN}
    columns |= {name: [_encode_array(getattr(s, name)) for s in samples] for name in _ARRAYS}
    columns["placement"] = [_encode_placement(s.placement) for s in samples]
    payload = {
        "schema_version": SCHEMA_VERSION,
        "model": recording.model,
        "options": recording.options,
        "rank": recording.rank,
        "world_size": recording.world_size,
        "versions": recording.versions,
        "lost": asdict(recording.lost),
        "parallel": None if recording.parallel is None else asdict(recording.parallel),
        "routers": [asdict(router) for router in recording.routers],
        "samples": columns,
        **_encode_graphs(recording),
        **extra,
    }
    return msgspec.json.encode(payload)


def decode_recording(payload: Any) -> Recording:
    """The inverse of `encode_recording`, from parsed JSON.

    Raises:
        SchemaError: an unknown schema version.
        TraceFileError: fields of another form.
    """
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if version != SCHEMA_VERSION:
        raise SchemaError(
            f"found moe_trace data of schema version {version!r}, expected {SCHEMA_VERSION}; "
            "read it with the moe_trace release that wrote it"
        )
    try:
        routers = tuple(msgspec.convert(r, RouterInfo) for r in payload["routers"])
        rank, world_size = (msgspec.convert(payload[key], int) for key in ("rank", "world_size"))
        return Recording(
            model=_mapping(payload["model"]),
            options=_mapping(payload["options"]),
            routers=routers,
            samples=tuple(_decode_samples(payload["samples"], routers)),
            lost=msgspec.convert(payload["lost"], Lost),
            rank=_rank(rank),
            world_size=_rank(world_size),
            versions=msgspec.convert(payload["versions"], dict[str, str]),
            parallel=_decode_parallel(payload.get("parallel"), rank, max(rank + 1, world_size)),
            **_decode_graphs(payload.get("graphs")),
        )
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, msgspec.ValidationError) as error:
        raise TraceFileError(
            f"found moe_trace data that does not follow schema version {SCHEMA_VERSION} "
            f"({type(error).__name__}: {error}); the file was changed after it was written"
        ) from error


def _encode_graphs(recording: Recording) -> dict[str, Any]:
    """Nothing where no graph was recorded."""
    graphs = {
        "marks": [asdict(mark) for mark in recording.graph_marks],
        "captured": [asdict(graph) for graph in recording.captured_graphs],
        "annotated": recording.annotated_nodes,
        "compiled": recording.graphs_compiled,
    }
    return {"graphs": graphs} if any(graphs.values()) else {}


def _decode_graphs(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return {
        "graph_marks": msgspec.convert(value["marks"], tuple[GraphMark, ...]),
        "captured_graphs": msgspec.convert(value["captured"], tuple[CapturedGraph, ...]),
        "graphs_compiled": msgspec.convert(value["compiled"], bool),
        "annotated_nodes": msgspec.convert(value["annotated"], dict[str, tuple[int, ...]]),
    }


def _rank(value: int) -> int:
    if not 0 <= value <= _RANKS_MAX:
        raise ValueError(f"expected ranks from 0 to {_RANKS_MAX:,}, found {value}")
    return value


def _decode_parallel(value: Any, rank: int, world_size: int) -> Parallel | None:
    """Groups hold the rank itself, each rank once, and no rank that the run does not have."""
    parallel = msgspec.convert(value, Parallel | None)
    for group in (parallel.token_ranks, parallel.expert_ranks) if parallel is not None else ():
        wrong = rank not in group or len(set(group)) < len(group)
        if group and (wrong or not all(0 <= other < world_size for other in group)):
            raise ValueError(f"expected a group with rank {rank}, of {world_size} ranks, found {list(group)}")
    return parallel


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {type(value).__name__}")
    return value


def _encode_array(values: np.ndarray | None) -> list[int] | None:
    return None if values is None else values.tolist()


def _encode_placement(placement: Placement | None) -> list[Any] | None:
    if placement is None:
        return None
    spans: list[Any] = [_encode_spans(placement.host), _encode_spans(placement.device)]
    return [*spans, placement.busy_us] if placement.busy_us else spans


def _encode_spans(spans: dict[RangeKind, Span]) -> list[list[float] | None]:
    """As older releases wrote them where there is nothing that these could not read."""
    kinds = RANGE_KINDS if "graph" in spans else RANGE_KINDS[:_FIRST_KINDS]
    return [[spans[kind].start_us, spans[kind].duration_us] if kind in spans else None for kind in kinds]


def _decode_placement(value: Any) -> Placement | None:
    if value is None:
        return None
    host, device, *busy = value
    busy_us = msgspec.convert(busy[0] if busy else {}, dict[RangeKind, float])
    return Placement(
        host=_decode_spans(host),
        device=_decode_spans(device),
        busy_us={kind: _finite(number) for kind, number in busy_us.items()},
    )


def _decode_spans(value: list[Any]) -> dict[RangeKind, Span]:
    kinds = RANGE_KINDS if len(value) == len(RANGE_KINDS) else RANGE_KINDS[:_FIRST_KINDS]
    pairs = zip(kinds, value, strict=True)
    return {kind: Span(_finite(pair[0]), _finite(pair[1])) for kind, pair in pairs if pair is not None}


def _finite(value: Any) -> float:
    """The recorder writes no NaN and no infinity; a file that has them was changed."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {number}")
    return number


class _PlainColumns(msgspec.Struct):
    """The types of one row; msgspec checks them, so that a hostile file cannot smuggle in others."""

    call: int
    step: int
    phase: str
    stage: str
    tokens: int
    top_k: int
    skipped: int
    computed_slots: int
    padding_assignments: int
    nonfinite_tokens: int
    router_entropy: float | None
    confidence: float | None
    top1_prob: float | None
    topk_mass: float | None
    z_loss: float | None
    router_flops: int
    expert_flops: int
    memory_allocated_bytes: int | None
    host_start_ns: int
    host_end_ns: int
    thread: int
    profiled: bool
    aux_loss: float | None
    in_graph: bool
    graph_forward: int | None
    slot_bytes: int | None


def _decode_samples(columns: Any, routers: tuple[RouterInfo, ...]) -> list[RoutingSample]:
    names = ("router", *_PLAIN, *_ARRAYS, "placement")
    missing = {
        name: [value] * len(columns["router"]) for name, value in _LATER.items() if name not in columns
    }
    columns = columns | missing
    lengths = {len(columns[name]) for name in names}
    if len(lengths) > 1:
        raise ValueError(f"columns of different lengths: {sorted(lengths)}")
    to_array: Callable[[Any], np.ndarray | None] = _int_array
    samples = []
    for row in zip(*(columns[name] for name in names), strict=True):
        values = dict(zip(names, row, strict=True))
        router = routers[msgspec.convert(values.pop("router"), int)]
        arrays: dict[str, Any] = {name: to_array(values.pop(name)) for name in _ARRAYS}
        if arrays["assignments"] is None or arrays["k_histogram"] is None:
            raise ValueError("expected a list of counts, found null")
        placement = _decode_placement(values.pop("placement"))
        plain = msgspec.to_builtins(msgspec.convert(values, _PlainColumns))
        for figure in filter(lambda value: isinstance(value, float), plain.values()):
            _finite(figure)
        samples.append(
            RoutingSample(
                site=router.site, name=router.name, layer=router.layer, placement=placement, **arrays, **plain
            )
        )
    return samples


def _int_array(values: Any) -> np.ndarray | None:
    numbers = msgspec.convert(values, list[int] | None)
    return None if numbers is None else np.array(numbers, dtype=np.int64)


def with_samples(recording: Recording, samples: tuple[RoutingSample, ...], lost: Lost) -> Recording:
    """The same recording with other samples and losses."""
    return replace(recording, samples=samples, lost=lost)
