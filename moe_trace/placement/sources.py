"""Find out what a path holds, traces or counts, and read it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moe_trace.data.errors import UsageError
from moe_trace.placement.counts import ExpertCounts, Kind, Layer
from moe_trace.placement.recorded import counts_of_traces
from moe_trace.read.file.filters import Filter
from moe_trace.read.file.opening import open_trace_stream

_FORMS = (
    "a trace, a folder of traces, what `moe-trace export --to eplb` wrote, or JSON with "
    '`"counts": {text: [layers][experts]}` or `"logical_count": [steps][layers][experts]`'
)


class _Entry(msgspec.Struct):
    site: str
    name: str = ""
    layer: int | None = None


class _CountsFile(msgspec.Struct):
    """`export --to eplb` as JSON, or counts per text; other keys say where they come from."""

    counts: dict[str, list[list[int]]] | list[list[int]]
    layers: list[_Entry | int] = []
    model: Any = None


class _SGLangCounts(msgspec.Struct):
    logical_count: list[Any]


def read_counts(
    path: str | Path, *, chosen: Filter | None = None, slot_bytes: int | None = None
) -> ExpertCounts:
    """The counts of a trace, a folder of traces, or a file of counts.

    Args:
        chosen: which layers and calls of a trace; layers of a file of counts.
        slot_bytes: what a slot moves one way, where the source does not tell or is to be overruled.

    Raises:
        TraceFileError: a trace cannot be read.
        UsageError: counts of another form, or none at all.
    """
    path = Path(path)
    is_array = path.suffix == ".npy" or _starts_as_array(path)
    if not is_array:
        _refuse_other_files(path)
    if is_array:
        return counts_of_array(path, _loaded(path), chosen=chosen, slot_bytes=slot_bytes)
    key = _counts_key(path) if path.is_file() and path.suffix == ".json" else None
    if key == "logical_count":
        return counts_of_array(path, _of_sglang(path), chosen=chosen, slot_bytes=slot_bytes)
    if key is not None:
        return _with_bytes(_of_layers(_of_json(path), chosen or Filter()), slot_bytes)
    return _with_bytes(counts_of_traces(path, chosen), slot_bytes)


def counts_of_array(
    path: str | Path, array: Any, *, chosen: Filter | None = None, slot_bytes: int | None = None
) -> ExpertCounts:
    """Whole numbers [layers, experts] or [steps, layers, experts] that stood in a file.

    Raises:
        UsageError: counts of another form, or none at all.
    """
    counts = _whole_numbers(Path(path), array)
    counts = counts[None] if counts.ndim == 2 else counts
    entries = [_Entry(f"L{i:02d}", "", i) for i in range(counts.shape[1])]
    labels = tuple(str(i) for i in range(len(counts)))
    found = _made(Path(path), "step", labels, entries, counts)
    return _with_bytes(_of_layers(found, chosen or Filter()), slot_bytes)


def _starts_as_array(path: Path) -> bool:
    """A pipe's copy is not named by what it holds."""
    if not os.path.isfile(path):  # false, too, for what is no possible name
        return False
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _refuse_other_files(path: Path) -> None:
    """Counts of another tool are no broken trace: say which forms of counts are taken.

    Raises:
        UsageError: the file's first bytes are not those of a trace.
    """
    if not path.is_file():
        return  # a folder, or nothing: who reads it says what is wrong
    with path.open("rb") as file:
        first = file.read(4096)
    if not first or first.startswith(b"\x1f\x8b"):
        return
    one_object_a_line = path.suffix == ".jsonl"
    if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{" and not one_object_a_line:
        return
    known = {b"PK": "a zip archive (torch.save, .npz)", b"\x80": "a pickle"}
    found = next((what for start, what in known.items() if first.startswith(start)), None)
    found = found or (f"a {path.suffix} file" if path.suffix else "no JSON object")
    raise UsageError(
        f"{path}: found {found}, expected {_FORMS}; bring the counts into the form [layers, experts] or "
        "[steps, layers, experts] and write them with numpy.save(...) as a .npy file of whole numbers"
    )


def _with_bytes(counts: ExpertCounts, slot_bytes: int | None) -> ExpertCounts:
    if slot_bytes is None:
        return counts
    if slot_bytes < 1:
        raise UsageError(f"found --slot-bytes {slot_bytes}, expected 1 or more")
    return replace(counts, layers=tuple(replace(layer, slot_bytes=slot_bytes) for layer in counts.layers))


def _counts_key(path: Path) -> str | None:
    """The key of a JSON file that holds counts; None where there is none, or a trace before it."""
    with open_trace_stream(path) as stream:
        for key in stream.walk():
            if key in ("counts", "logical_count", "traceEvents"):
                return None if key == "traceEvents" else key
            stream.skip()
    return None


def _of_sglang(path: Path) -> np.ndarray:
    """`{"logical_count": [steps][layers][experts] or [layers][experts]}`, as SGLang's server is given it."""
    try:
        return np.array(msgspec.json.decode(path.read_bytes(), type=_SGLangCounts).logical_count)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{path}: found a logical_count of another form ({error!s:.100}); expected whole numbers "
            "[layers][experts] or [steps][layers][experts]"
        ) from error


def _loaded(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise UsageError(
            f"{path}: found no array that numpy can read ({error}); expected {_FORMS}"
        ) from error


def _whole_numbers(path: Path, array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (2, 3):
        form = (
            f"{array.dtype} of the form {list(array.shape)}"
            if isinstance(array, np.ndarray)
            else "an archive"
        )
        raise UsageError(
            f"{path}: found {form}, expected whole numbers [layers, experts] or [steps, layers, experts]"
        )
    if array.size and array.max() >= 2**53:
        raise UsageError(f"{path}: found a count of 2^53 or more; scale the counts down")
    return array.astype(np.int64)


def _of_json(path: Path) -> ExpertCounts:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_CountsFile)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: found counts of another form ({error}); expected {_FORMS}") from error
    by_text = found.counts if isinstance(found.counts, dict) else {"0": found.counts}
    try:
        counts = np.array(list(by_text.values()), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{path}: found rows of different lengths, or counts too large; expected [layers][experts] whole "
            "numbers, in one form for all texts"
        ) from error
    if counts.ndim != 3 or 0 in counts.shape:
        raise UsageError(f"{path}: found no counts in the file; expected {_FORMS}")
    kind: Kind = "text" if isinstance(found.counts, dict) else "step"
    given = found.layers or list(range(counts.shape[1]))
    entries = [_Entry(f"L{e:02d}", "", e) if isinstance(e, int) else e for e in given]
    model = found.model if isinstance(found.model, str) else "unnamed model"
    return _made(path, kind, tuple(by_text), entries, counts, model)


def _made(
    path: Path,
    kind: Kind,
    labels: tuple[str, ...],
    entries: list[_Entry],
    counts: np.ndarray,
    model: str = "unnamed model",
) -> ExpertCounts:
    layers = tuple(Layer(site=e.site, name=e.name, layer=e.layer) for e in entries)
    return ExpertCounts(
        source=str(path), model=model, kind=kind, labels=labels, layers=layers, counts_SLE=counts
    )


def _of_layers(counts: ExpertCounts, chosen: Filter) -> ExpertCounts:
    """The chosen layers of a file of counts, which knows no steps and phases."""
    if chosen.steps or chosen.stages:
        raise UsageError(f"{counts.source}: --step and --phase choose calls of a trace; these are counts")
    if not chosen.layers:
        return counts
    kept = [
        i
        for i, layer in enumerate(counts.layers)
        if {str(layer.layer), layer.site, layer.name} & chosen.layers
    ]
    if not kept:
        sites = ", ".join(layer.site for layer in counts.layers[:8])
        raise UsageError(f"{counts.source}: found no layer of --layer; it has {sites}")
    return replace(
        counts, layers=tuple(counts.layers[i] for i in kept), counts_SLE=counts.counts_SLE[:, kept]
    )
