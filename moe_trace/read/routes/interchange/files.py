"""Import and export files of other tools, by their suffixes."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_trace.data.errors import TraceFileError, UsageError
from moe_trace.data.files import whole_file
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.interchange.arrays import Capture, capture_of_arrays
from moe_trace.read.routes.interchange.megatron import (
    capture_of_router_trace,
    is_router_trace,
    router_trace_lines,
)
from moe_trace.read.routes.interchange.responses import capture_of_responses
from moe_trace.read.routes.interchange.tables import (
    read_arrow,
    read_safetensors,
    routes_of_columns,
    write_arrow,
    write_safetensors,
)

ENDINGS = (".npy", ".npz", ".json", ".jsonl", ".parquet", ".arrow", ".feather", ".safetensors")
FORMATS = {
    "npy": ".npy",
    "npz": ".npz",
    "megatron": ".jsonl",
    "parquet": ".parquet",
    "arrow": ".arrow",
    "safetensors": ".safetensors",
}
"""Suffix by export format."""
_FREE_BYTES, _EXPANSION = 1 << 30, 200


def import_routes(
    path: str | Path,
    *,
    num_experts: int | None = None,
    layers: int | None = None,
    top_k: int | None = None,
    ending: str | None = None,
) -> tuple[RecordedRoutes, list[str]]:
    """Read routes that another tool captured; also return descriptions of the changes made to them.

    Args:
        num_experts, layers, top_k: Values that the capture does not contain.
        ending: Suffix to assume instead of the file's own.

    Raises:
        TraceFileError: The file cannot be read, or contains no expert ids.
        UsageError: The suffix is unknown, or a value must be given.
        MissingPackage: The format requires a package that is not installed.
    """
    file = Path(path)
    ending = ending or file.suffix
    if ending not in ENDINGS:
        raise UsageError(f"found {file.name!r}, expected a file that ends in {', '.join(ENDINGS)}")
    if file.is_dir():
        raise TraceFileError(f"{file}: is a folder, expected a file; name one of those in it")
    try:
        found = _read(file, ending, layers, top_k)
    except OSError as error:
        raise TraceFileError(
            f"{file}: cannot be read ({error.strerror or error}), expected captured routes; check the path"
        ) from error
    if isinstance(found, RecordedRoutes):
        return found, []
    return found.routes(str(file), num_experts), found.notes


def _read(file: Path, ending: str, layers: int | None, top_k: int | None) -> RecordedRoutes | Capture:
    if ending in (".parquet", ".arrow", ".feather"):
        return read_arrow(file, parquet=ending == ".parquet")
    if ending == ".safetensors":
        tensors, text = read_safetensors(file)
        if text is not None:
            return routes_of_columns(tensors, text, str(file))
        return capture_of_arrays(tensors, str(file))
    if ending not in (".json", ".jsonl"):
        return capture_of_arrays(_arrays(file, ending), str(file))
    try:
        text = file.read_text("utf-8")
        lines = text.splitlines() if ending == ".jsonl" else [text]
        values = [json.loads(line) for line in lines if line.strip() or ending == ".json"]
    except (ValueError, RecursionError) as error:
        raise TraceFileError(
            f"{file}: found no JSON ({error!s:.100}), expected responses of a server or a router trace"
        ) from error
    if ending == ".json" and isinstance(values[0], list):
        (values,) = values
    if is_router_trace(values):
        return capture_of_router_trace(values, str(file))
    return capture_of_responses(values, str(file), layers=layers, top_k=top_k)


def _arrays(file: Path, ending: str) -> dict[str, np.ndarray]:
    """Load arrays of a .npy or .npz, without pickles and with a limit on decompressed size."""
    try:
        if ending == ".npy":
            return {"routed_experts": np.load(file, mmap_mode="r", allow_pickle=False)}
        with zipfile.ZipFile(file) as archive:
            total = sum(member.file_size for member in archive.infolist())
        size = os.path.getsize(file)
        if total > max(_FREE_BYTES, _EXPANSION * size):
            raise ValueError(f"{size:,} bytes would expand to {total:,}")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: array for name in arrays.files if isinstance(array := arrays[name], np.ndarray)}
    except (ValueError, EOFError, SyntaxError, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
        raise TraceFileError(
            f"{file}: found no arrays of numbers ({error!s:.150}), expected {ending} of expert ids; save it "
            "with numpy.save or numpy.savez"
        ) from error


def export_routes(routes: RecordedRoutes, target: str | Path, format_name: str) -> list[str]:
    """Write the first group of layers for other tools, completely or not at all; return what was left out.

    npy is [tokens, layers, top_k] of int16 (int32 from 32768 experts on) with -1 for no expert, like vLLM's,
    in the order of the rows; npz adds padding, sequence, position and the rest; megatron is a router trace.

    Raises:
        OutputError: The file cannot be written.
        MissingPackage: The format requires a package that is not installed.
        UsageError: The format is unknown.
    """
    if format_name not in FORMATS:
        raise UsageError(f"found the format {format_name!r}, expected one of {', '.join(FORMATS)}")
    first = replace(routes, others=())
    with whole_file(target) as temporary:
        if format_name in ("npy", "npz"):
            with temporary.open("wb") as file:
                _write_numpy(first, file, format_name)
        elif format_name == "megatron":
            with temporary.open("w", encoding="utf-8") as file_of_lines:
                file_of_lines.writelines(line + "\n" for line in router_trace_lines(first))
        elif format_name == "safetensors":
            write_safetensors(first, temporary)
        else:
            write_arrow(first, temporary, parquet=format_name == "parquet")
    if not routes.others:
        return []
    layers = sum(len(group.layers) for group in routes.others)
    return [f"{layers} layers of {len(routes.others)} other groups, which saw other tokens, are left out"]


def _write_numpy(routes: RecordedRoutes, file: BinaryIO, format_name: str) -> None:
    ids = routes.expert_ids.astype(np.int16 if max(routes.num_experts, default=0) < 1 << 15 else np.int32)
    ids[routes.skipped] = -1
    if format_name == "npy":
        np.save(file, ids)
        return
    others: Any = {name: column for name, column in routes.columns().items() if name != "expert_ids"}
    np.savez_compressed(file, routed_experts=ids, **others)
