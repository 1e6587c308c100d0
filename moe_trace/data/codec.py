"""Encoding of a `Recording` as the JSON stored in a trace under the key `moe_trace`, and its decoding.

Samples are written by column: sixteen layers of a thousand steps share their field names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.placements import SIDES, Places, Side
from moe_trace.data.calls.ragged import CountLists
from moe_trace.data.calls.slot_maps import all_maps, changes_only
from moe_trace.data.calls.table import (
    DEFAULTS,
    LISTS,
    NUMBERS,
    OPTIONAL,
    CallTable,
    RouterKey,
    column_of,
    kind_of,
)
from moe_trace.data.compiled_graph import decode_compiled, encode_compiled
from moe_trace.data.display.json import attributes
from moe_trace.data.errors import SchemaError, TraceFileError
from moe_trace.data.schema import (
    RANGE_KINDS,
    RANKS_MAX,
    SCHEMA_VERSION,
    CapturedGraph,
    GraphMark,
    Lost,
    Parallel,
    RangeKind,
    Recording,
    RouterInfo,
)

SAMPLES_KEY = "samples"
"""The one large value; it is decoded straight into columns."""
_OLD_KIND_COUNT = 3  # range kinds in the placements of older files


_Rank = Annotated[int, msgspec.Meta(ge=0, le=RANKS_MAX)]


class _Graphs(msgspec.Struct):
    marks: tuple[GraphMark, ...] = ()
    captured: tuple[CapturedGraph, ...] = ()
    annotated: dict[str, tuple[int, ...]] = {}
    compiled: bool = False


class _Payload(msgspec.Struct, kw_only=True):
    model: dict[str, Any]
    options: dict[str, Any]
    rank: _Rank
    world_size: _Rank
    versions: dict[str, str]
    lost: Lost
    parallel: Parallel | None = None
    routers: tuple[RouterInfo, ...]
    samples: Any
    routes: str | None = None
    graphs: _Graphs | None = None
    compiled_graphs: Any = None


_SHARED_FIELDS = (
    "model",
    "options",
    "routers",
    "rank",
    "world_size",
    "versions",
    "lost",
    "parallel",
    "routes",
)
"""Attributes of the same name in `Recording`."""


def encode_recording(recording: Recording, **extra: Any) -> bytes:
    """Return one line of JSON, with the `extra` keys at its top level."""
    index = {router.name: i for i, router in enumerate(recording.routers)}
    calls = recording.calls
    by_key = np.array([index[key.name] for key in calls.keys], np.int64)
    columns: dict[str, Any] = {"router": by_key[calls.router].tolist()}
    left_out = {name for name in (*NUMBERS, *LISTS) if _is_omitted(name, calls)}
    columns |= {name: calls.values(name) for name in NUMBERS if name not in left_out}
    columns |= {
        name: _raw_list(map(msgspec.json.encode, calls.lists[name].to_lists()))
        for name in LISTS
        if name not in left_out
    }
    if "slot_experts" in columns:  # the map seldom changes
        columns["slot_experts"] = _raw_list(
            map(msgspec.json.encode, changes_only(calls.lists["slot_experts"], by_key[calls.router]))
        )
    columns["placement"] = _raw_list(_encode_places(calls.places))
    payload = {
        "schema_version": SCHEMA_VERSION,
        **attributes(recording, "model", "options", "rank", "world_size", "versions"),
        # With `asdict`: msgspec omits fields that were defaulted when reading an older file.
        "lost": asdict(recording.lost),
        "parallel": None if recording.parallel is None else asdict(recording.parallel),
        "routers": [asdict(router) for router in recording.routers],
        SAMPLES_KEY: columns,
        **({} if recording.routes is None else {"routes": recording.routes}),
        **_encode_graphs(recording),
        **extra,
    }
    try:
        return msgspec.json.encode(payload)
    except UnicodeEncodeError:  # a file name that is not valid UTF-8
        text = json.dumps(payload, ensure_ascii=False, default=msgspec.json.decode)
        return text.encode("utf-8", "replace")


def decode_recording(payload: Any) -> Recording:
    """Decode parsed JSON that `encode_recording` wrote. The samples may be `msgspec.Raw`.

    Raises:
        SchemaError: the schema version is unknown.
        TraceFileError: the fields do not follow the schema.
    """
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if version != SCHEMA_VERSION:
        raise SchemaError(
            f"found moe_trace data of schema version {version!r}, expected {SCHEMA_VERSION}; "
            "read it with the moe_trace release that wrote it"
        )
    try:
        found = msgspec.convert(payload, _Payload)
        _require_groups(found)
        graphs = found.graphs or _Graphs()
        return Recording(
            **attributes(found, *_SHARED_FIELDS),
            samples=_decode_calls(found.samples, found.routers),
            graph_marks=graphs.marks,
            captured_graphs=graphs.captured,
            graphs_compiled=graphs.compiled,
            annotated_nodes=graphs.annotated,
            compiled_graphs=decode_compiled(found.compiled_graphs),
        )
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, msgspec.DecodeError) as error:
        raise TraceFileError(
            f"found moe_trace data that does not follow schema version {SCHEMA_VERSION} "
            f"({type(error).__name__}: {error}); the file was changed after it was written"
        ) from error


def _encode_graphs(recording: Recording) -> dict[str, Any]:
    graphs = {
        "marks": [asdict(mark) for mark in recording.graph_marks],
        "captured": [asdict(graph) for graph in recording.captured_graphs],
        "annotated": recording.annotated_nodes,
        "compiled": recording.graphs_compiled,
    }
    encoded: dict[str, Any] = {"graphs": graphs} if any(graphs.values()) else {}
    if recording.compiled_graphs:
        encoded["compiled_graphs"] = encode_compiled(recording.compiled_graphs)
    return encoded


def _is_omitted(name: str, calls: CallTable) -> bool:
    """Return whether a column added in a later release holds only None, so that it can be omitted."""
    if DEFAULTS.get(name, 0) is not None:
        return False
    if name in LISTS:
        return not calls.lists[name].known.any()
    return all(value is None for value in calls.values(name))


def _require_groups(payload: _Payload) -> None:
    """Check that each group contains this rank, no rank twice, and only ranks of the run."""
    rank, parallel, world_size = payload.rank, payload.parallel, max(payload.rank + 1, payload.world_size)
    for group in (parallel.token_ranks, parallel.expert_ranks) if parallel is not None else ():
        wrong = rank not in group or len(set(group)) < len(group)
        if group and (wrong or not all(0 <= other < world_size for other in group)):
            raise ValueError(f"expected a group with rank {rank}, of {world_size} ranks, found {list(group)}")


def number_cells(column: npt.NDArray) -> list[bytes]:
    """Return the JSON of each number; null for NaN."""
    return msgspec.json.encode(column.tolist())[1:-1].split(b",") if len(column) else []


def _raw_list(cells: Iterable[bytes]) -> msgspec.Raw:
    """Join encoded cells. Thousands of small lists alive at once would trigger the garbage collector."""
    return msgspec.Raw(b"[%b]" % b",".join(cells))


def _encode_places(places: Places) -> Iterator[bytes]:
    """Encode placements, in the form of older releases where it can represent them."""
    sides = [_encode_side(places, side) for side in SIDES]
    busy = {kind: column.tolist() for kind, column in places.busy_us.items()}
    for row, (placed, host, device) in enumerate(zip(places.placed.tolist(), *sides, strict=True)):
        known = {kind: us[row] for kind, us in busy.items() if us[row] == us[row]}
        busy_field = b",%b" % msgspec.json.encode(known) if known else b""
        yield b"[%b,%b%b]" % (host, device, busy_field) if placed else b"null"


def _encode_side(places: Places, side: Side) -> Iterator[bytes]:
    edges = [number_cells(column) for kind in RANGE_KINDS for column in places.span(side, kind).T]
    for row in zip(*edges, strict=True):
        pairs = zip(row[::2], row[1::2], strict=True)
        spans = [start if start == b"null" else b"[%b,%b]" % (start, taken) for start, taken in pairs]
        yield b"[%b]" % b",".join(spans if spans[-1] != b"null" else spans[:_OLD_KIND_COUNT])


_Spans = list[tuple[float, float] | None]


class _Placement(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """A placement as stored in the file: spans by kind, None where there is none."""

    host: _Spans
    device: _Spans
    busy_us: dict[RangeKind, float] = {}


def _cells(name: str) -> Any:
    cell: Any = list[int] if name in LISTS else kind_of(name)
    return list[cell | None] if name in OPTIONAL else list[cell]


# Typed, so that a malicious file cannot inject other values. Fields added in later releases may be missing.
_Columns = msgspec.defstruct(
    "_Columns",
    [
        ("router", list[int]),
        ("placement", list[_Placement | None]),
        *((name, _cells(name)) for name in (*NUMBERS, *LISTS) if name not in DEFAULTS),
        *((name, _cells(name) | None, None) for name in (*NUMBERS, *LISTS) if name in DEFAULTS),
    ],
    gc=False,
)


def _decode_calls(value: Any, routers: tuple[RouterInfo, ...]) -> CallTable:
    raw = isinstance(value, msgspec.Raw)
    columns: Any = msgspec.json.decode(value, type=_Columns) if raw else msgspec.convert(value, _Columns)
    router = np.array(columns.router, np.int64)
    if len(router) and not 0 <= int(router.min()) <= int(router.max()) < len(routers):
        raise ValueError(f"expected routers from 0 to {len(routers) - 1}, found others")
    cells = {name: getattr(columns, name) for name in (*NUMBERS, *LISTS, "placement")}
    cells |= {name: [DEFAULTS[name]] * len(router) for name, values in cells.items() if values is None}
    lengths = {len(router), *map(len, cells.values())}
    if len(lengths) > 1:
        raise ValueError(f"columns of different lengths: {sorted(lengths)}")
    numbers = {name: column_of(name, cells[name]) for name in NUMBERS}
    for name, column in numbers.items():
        if kind_of(name) is float:
            _require_finite(column, cells[name])
    lists = {name: CountLists.of(cells[name]) for name in LISTS}
    slots = [(r.num_slots, r.num_experts) for r in routers]
    lists["slot_experts"] = all_maps(lists["slot_experts"], lists["slot_assignments"], router, slots)
    return CallTable(
        tuple(RouterKey(r.site, r.name, r.layer) for r in routers),
        router,
        numbers,
        lists,
        _decode_places(cells["placement"]),
    )


def _decode_places(rows: list[_Placement | None]) -> Places:
    spans: dict[tuple[Side, RangeKind], np.ndarray] = {}
    absent = (math.nan, math.nan)
    for side in SIDES:
        found: list[Any] = [() if row is None else getattr(row, side) for row in rows]
        if {len(kinds) for kinds in found} - {0, _OLD_KIND_COUNT, len(RANGE_KINDS)}:
            raise ValueError(f"expected the spans of {_OLD_KIND_COUNT} or {len(RANGE_KINDS)} kinds of ranges")
        for i, kind in enumerate(RANGE_KINDS):
            pairs = [kinds[i] if len(kinds) > i else None for kinds in found]
            if any(pairs):
                spans[side, kind] = np.array([pair or absent for pair in pairs], np.float64)
                _require_finite(spans[side, kind], pairs)
    busy = {}
    for kind in {kind: None for row in rows if row is not None for kind in row.busy_us}:
        us = [None if row is None else row.busy_us.get(kind) for row in rows]
        busy[kind] = np.array(us, np.float64)
        _require_finite(busy[kind], us)
    return Places(np.array([row is not None for row in rows], bool), spans, busy)


def _require_finite(column: np.ndarray, cells: Sequence[Any]) -> None:
    """Reject NaN and infinity, which the recorder never writes."""
    if not np.isfinite(column[[cell is not None for cell in cells]]).all():
        raise ValueError("expected finite numbers, found others")
