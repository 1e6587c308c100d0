"""Routes as columns with JSON metadata: Parquet, Arrow and safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.data.errors import TraceFileError, optional_package
from moe_trace.data.routes.columns import COLUMNS, RecordedRoutes

KEY = "moe_trace_routes"
"""Key of the JSON text in the file's metadata."""
_DESCRIBED = ("layers", "num_experts", "top_k", "rank", "world_size", "model", "versions", "dropped")


def described(routes: RecordedRoutes) -> str:
    """Encode everything except the columns, for the first group."""
    plain: dict[str, Any] = {name: getattr(routes, name) for name in _DESCRIBED}
    plain["shape"] = routes.expert_ids.shape[1:]
    return json.dumps(plain, default=_plain)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def routes_of_columns(columns: Mapping[str, np.ndarray], text: str | bytes, source: str) -> RecordedRoutes:
    """Decode routes from the output of `described` and their columns.

    Raises:
        TraceFileError: They do not match.
    """
    try:
        description = json.loads(text)
        shape = tuple(description.pop("shape"))
        chosen: dict[str, Any] = {name: description[name] for name in _DESCRIBED}
        chosen |= {name: tuple(chosen[name]) for name in ("layers", "num_experts", "top_k")}
        for name in COLUMNS:
            if name in columns:
                inner_shape = {"expert_ids": shape, "weights": shape, "lost_layers": shape[:1]}.get(name, ())
                chosen[name] = np.ascontiguousarray(columns[name]).reshape(-1, *inner_shape)
        if (chosen["stage_codes"] > 2).any():
            raise ValueError("an unknown stage")
        return RecordedRoutes(**chosen)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TraceFileError(
            f"{source}: found columns that are no routes ({error!s:.150}); expected a file that `moe-trace "
            "routes export` wrote"
        ) from error


def write_arrow(routes: RecordedRoutes, target: Path, *, parquet: bool) -> None:
    """Write a row for each token, with [layers, top_k] as a list of fixed size.

    Raises:
        MissingPackage: pyarrow is not installed.
    """
    arrow, module = _packages(parquet=parquet)
    arrays = {}
    for name, column in routes.columns().items():
        flat = arrow.array(np.ascontiguousarray(column).reshape(-1))
        width = int(np.prod(column.shape[1:], dtype=np.int64))
        arrays[name] = arrow.FixedSizeListArray.from_arrays(flat, width) if column.ndim > 1 else flat
    table = arrow.table(arrays).replace_schema_metadata({KEY: described(routes)})
    if parquet:  # with a dictionary, since Parquet has no 8-bit integers
        module.write_table(table, target, compression="zstd", use_dictionary=True)
    else:
        module.write_feather(table, target, compression="zstd")


def _packages(*, parquet: bool) -> tuple[Any, Any]:
    name, format_name = ("pyarrow.parquet", "Parquet") if parquet else ("pyarrow.feather", "Arrow")
    arrow = optional_package("pyarrow", format_name, "'moe_trace[export]'")
    return arrow, optional_package(name, format_name, "'moe_trace[export]'")


def read_arrow(path: Path, *, parquet: bool) -> RecordedRoutes:
    """Read the output of `write_arrow`.

    Raises:
        TraceFileError: It is another table, or none.
        MissingPackage: pyarrow is not installed.
    """
    arrow, module = _packages(parquet=parquet)
    try:
        table = module.read_table(path)
    except arrow.ArrowException as error:
        raise _unreadable(path, error) from error
    columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        flat = column.flatten() if arrow.types.is_fixed_size_list(column.type) else column
        columns[name] = flat.to_numpy(zero_copy_only=False)
    return routes_of_columns(columns, (table.schema.metadata or {}).get(KEY.encode(), b"null"), str(path))


def write_safetensors(routes: RecordedRoutes, target: Path) -> None:
    """Write a tensor for each column.

    Raises:
        MissingPackage: safetensors is not installed.
    """
    module = optional_package("safetensors.numpy", "safetensors", "safetensors")
    columns = {name: np.ascontiguousarray(column) for name, column in routes.columns().items()}
    module.save_file(columns, target, metadata={KEY: described(routes)})


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """Read the tensors, and our JSON text if the file has it.

    Raises:
        TraceFileError: It is not a safetensors file.
        MissingPackage: safetensors is not installed.
    """
    module = optional_package("safetensors", "safetensors", "safetensors")
    try:
        with module.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(KEY)
            return {name: file.get_tensor(name) for name in file.keys()}, text  # noqa: SIM118
    except (module.SafetensorError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TraceFileError:
    first = (str(error).splitlines() or [""])[0]
    return TraceFileError(
        f"{path}: cannot be read ({first:.150}), expected routes; write the file again, or choose another"
    )
