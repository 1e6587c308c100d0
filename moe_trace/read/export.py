"""Export counts in the format of expert load balancers, and rows as Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.data.errors import UsageError, optional_package
from moe_trace.data.files import whole_file, write_text
from moe_trace.data.summary import Summary
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.rows import COLUMNS, LISTS_OF_ROWS, call_rows


def expert_counts(summary: Summary) -> np.ndarray:
    """Return the assignments, int64 [layers, experts], with layers in the model's order.

    This is the `weight` argument of `rebalance_experts` in DeepSeek's expert-parallel load balancer (EPLB),
    which calls experts "logical experts".

    Raises:
        UsageError: The layers have different numbers of experts.
    """
    routers = sorted(summary.routers, key=lambda r: (r.info.layer, r.info.site))
    sizes = {len(router.assignments) for router in routers}
    if len(sizes) != 1:
        raise UsageError(
            f"found layers of {', '.join(map(str, sorted(sizes))) or 'no'} experts, expected one number for "
            "all; choose the layers with --layer"
        )
    return np.array([router.assignments for router in routers], dtype=np.int64)


def write_eplb(summary: Summary, target: Path) -> None:
    """Write the array as `.npy`, or with any other suffix as JSON together with the layers' names."""
    counts = expert_counts(summary)
    if target.suffix == ".npy":
        with whole_file(target) as temporary, temporary.open("wb") as file:
            np.save(file, counts, allow_pickle=False)
        return
    routers = sorted(summary.routers, key=lambda r: (r.info.layer, r.info.site))
    layers = [{"site": r.info.site, "name": r.info.name, "layer": r.info.layer} for r in routers]
    write_text(target, json.dumps({"layers": layers, "counts": counts.tolist()}, ensure_ascii=False) + "\n")


def write_parquet(summaries: Sequence[TraceSummary], target: Path) -> None:
    """Write one row per call, with counts per expert as lists and the same columns and types in every file.

    Each field's metadata has its label, unit and definition.

    Raises:
        MissingPackage: pyarrow is not installed.
    """
    pyarrow = optional_package("pyarrow", "Parquet", "'moe_trace[export]'")
    parquet = optional_package("pyarrow.parquet", "Parquet", "'moe_trace[export]'")
    rows = [{"trace": s.trace, **row} for s in summaries for row in call_rows(s.samples, s.times, s.busy_us)]
    names = list(rows[0]) if rows else []
    schema = pyarrow.schema(
        [pyarrow.field(name, _arrow_type(pyarrow, name), metadata=_metadata(name)) for name in names]
    )
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    with whole_file(target) as temporary:
        parquet.write_table(table, temporary)


def _metadata(name: str) -> dict[str, str]:
    return COLUMNS[name].described() if name in COLUMNS else {}


_TEXTS = ("trace", "site", "name", "phase", "stage")
_FLOATS = ("router_entropy", "confidence", "top1_prob", "topk_mass", "z_loss")


def _arrow_type(pyarrow: Any, name: str) -> Any:
    if name in _TEXTS:
        return pyarrow.string()
    if name in LISTS_OF_ROWS:
        return pyarrow.list_(pyarrow.int64())
    if name in _FLOATS or name.startswith("load_") or name.endswith("_us"):
        return pyarrow.float64()
    return pyarrow.int64()
