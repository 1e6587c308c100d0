"""Detect whether a path holds traces or counts, and read counts from it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moe_trace.data.errors import UsageError
from moe_trace.placement.counts import ExpertCounts, Layer
from moe_trace.placement.recorded import counts_of_traces
from moe_trace.read.file.filters import Filter
from moe_trace.read.file.opening import open_trace_stream

_FORMS = (
    "a trace, a folder of traces, what `moe-trace export --to eplb` wrote, or JSON with "
    '`"counts": {text: [layers][experts]}` or `"logical_count": [steps][layers][experts]`'
)
_UNNAMED = "unnamed model"


class _CountsFile(msgspec.Struct):
    """JSON of `export --to eplb`, or counts per text; other keys describe the source."""

    counts: dict[str, list[list[int]]] | list[list[int]]
    layers: list[Layer | int] = []
    model: Any = None


class _SGLangCounts(msgspec.Struct):
    logical_count: list[Any]


def read_counts(
    path: str | Path, *, array: Any = None, chosen: Filter | None = None, slot_bytes: int | None = None
) -> ExpertCounts:
    """Read the counts of a trace, a folder of traces, or a file of counts.

    Args:
        array: Integers [layers, experts] or [steps, layers, experts], if the file was already read.
        chosen: Layers and calls of a trace to use, or layers of a file of counts.
        slot_bytes: Bytes that a slot moves in one direction; overrides the source.

    Raises:
        TraceFileError: A trace cannot be read.
        UsageError: The counts have another form, or there are none.
    """
    path = Path(path)
    if slot_bytes is not None and slot_bytes < 1:
        raise UsageError(f"found --slot-bytes {slot_bytes}, expected 1 or more")
    first = _first_bytes(path) if array is None else b""
    if array is None and (path.suffix == ".npy" or first.startswith(b"\x93NUMPY")):
        array = _load_numpy(path)  # the copy of a pipe has no suffix that describes its contents
    elif first:
        _refuse_other_files(path, first)
    key = _counts_key(path) if array is None and first and path.suffix == ".json" else None
    if key == "logical_count":
        array = _read_sglang(path)
    if array is None and key is None:
        counts = counts_of_traces(path, chosen)
    else:
        counts = _select_layers(
            _read_json(path) if array is None else _counts_of_array(path, array), chosen or Filter()
        )
    if slot_bytes is None:
        return counts
    return replace(counts, layers=tuple(replace(layer, slot_bytes=slot_bytes) for layer in counts.layers))


def _first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file, or none for other paths, whose errors the reader reports."""
    if not os.path.isfile(path):  # also false for strings that cannot be paths
        return b""
    with path.open("rb") as file:
        return file.read(4096)


def _refuse_other_files(path: Path, first: bytes) -> None:
    """Reject files that cannot be traces, and name the accepted forms of counts.

    Raises:
        UsageError: The first bytes are not those of a trace.
    """
    is_object = first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    if first.startswith(b"\x1f\x8b") or (is_object and path.suffix != ".jsonl"):
        return
    known = {b"PK": "a zip archive (torch.save, .npz)", b"\x80": "a pickle"}
    found = next((what for start, what in known.items() if first.startswith(start)), None)
    found = found or (f"a {path.suffix} file" if path.suffix else "no JSON object")
    raise UsageError(
        f"{path}: found {found}, expected {_FORMS}; bring the counts into the form [layers, experts] or "
        "[steps, layers, experts] and write them with numpy.save(...) as a .npy file of whole numbers"
    )


def _counts_key(path: Path) -> str | None:
    """Return the key of a JSON file that holds counts, or None if there is none or a trace comes first."""
    with open_trace_stream(path) as stream:
        for key in stream.walk():
            if key in ("counts", "logical_count", "traceEvents"):
                return None if key == "traceEvents" else key
            stream.skip()
    return None


def _read_sglang(path: Path) -> np.ndarray:
    """Read `{"logical_count": [steps][layers][experts] or [layers][experts]}`, the format of SGLang."""
    try:
        return np.array(msgspec.json.decode(path.read_bytes(), type=_SGLangCounts).logical_count)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{path}: found a logical_count of another form ({error!s:.100}); expected whole numbers "
            "[layers][experts] or [steps][layers][experts]"
        ) from error


def _load_numpy(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise UsageError(
            f"{path}: found no array that numpy can read ({error}); expected {_FORMS}"
        ) from error


def _counts_of_array(path: Path, array: Any) -> ExpertCounts:
    is_array = isinstance(array, np.ndarray)
    if not is_array or array.dtype.kind not in "iu" or array.ndim not in (2, 3):
        form = f"{array.dtype} of the form {list(array.shape)}" if is_array else "an archive"
        raise UsageError(
            f"{path}: found {form}, expected whole numbers [layers, experts] or [steps, layers, experts]"
        )
    if array.size and array.max() >= 2**53:
        raise UsageError(f"{path}: found a count of 2^53 or more; scale the counts down")
    counts = array.astype(np.int64)
    counts = counts[None] if counts.ndim == 2 else counts
    return ExpertCounts(
        source=str(path),
        model=_UNNAMED,
        kind="step",
        labels=tuple(map(str, range(len(counts)))),
        layers=_layers(range(counts.shape[1])),
        counts_SLE=counts,
    )


def _read_json(path: Path) -> ExpertCounts:
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_CountsFile)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: found counts of another form ({error}); expected {_FORMS}") from error
    by_text = content.counts if isinstance(content.counts, dict) else {"0": content.counts}
    try:
        counts = np.array(list(by_text.values()), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{path}: found rows of different lengths, or counts too large; expected [layers][experts] whole "
            "numbers, in one form for all texts"
        ) from error
    if counts.ndim != 3 or 0 in counts.shape:
        raise UsageError(f"{path}: found no counts in the file; expected {_FORMS}")
    return ExpertCounts(
        source=str(path),
        model=content.model if isinstance(content.model, str) else _UNNAMED,
        kind="text" if isinstance(content.counts, dict) else "step",
        labels=tuple(by_text),
        layers=_layers(content.layers or range(counts.shape[1])),
        counts_SLE=counts,
    )


def _layers(given: Iterable[Layer | int]) -> tuple[Layer, ...]:
    return tuple(
        Layer(site=f"L{layer:02d}", layer=layer)
        if isinstance(layer, int)
        else replace(layer, slot_bytes=None)
        for layer in given
    )


def _select_layers(counts: ExpertCounts, chosen: Filter) -> ExpertCounts:
    """Select layers in a file of counts, which has no steps or stages to filter by."""
    if chosen.steps or chosen.stages:
        raise UsageError(f"{counts.source}: --step and --phase choose calls of a trace; these are counts")
    if not chosen.layers:
        return counts
    rows = [
        i
        for i, layer in enumerate(counts.layers)
        if {str(layer.layer), layer.site, layer.name} & chosen.layers
    ]
    if not rows:
        sites = ", ".join(layer.site for layer in counts.layers[:8])
        raise UsageError(f"{counts.source}: found no layer of --layer; it has {sites}")
    return replace(
        counts, layers=tuple(counts.layers[i] for i in rows), counts_SLE=counts.counts_SLE[:, rows]
    )
