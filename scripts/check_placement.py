#!/usr/bin/env python3
"""Check the model behind `moe-trace placement` against the all-to-alls of a real run.

    torchrun --nproc-per-node 2 scripts/record_ep_steps.py --out runs/ep
    python scripts/check_placement.py runs/ep

FOLDER contains one trace per rank of a run with expert parallelism by all-to-all. It was recorded with
`record_shapes` (gloo) or over NCCL, which always records split sizes. The rows that each rank received are
read from the arguments of the collective alone. They are compared with the recorded counts under contiguous
placement:

    same steps     load per rank, call by call: must be exact
    other steps    load per rank of the judged steps, predicted from the chosen ones: the error of planning
    moved          slots that left their rank: the model assumes (R - 1) / R of all

The exit status is 1 if the first is not exact.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from moe_trace.data.display.tables import table  # noqa: E402
from moe_trace.placement.evaluation import judge  # noqa: E402
from moe_trace.placement.plan import Cluster, contiguous_plan  # noqa: E402
from moe_trace.placement.recorded import counts_of_traces  # noqa: E402
from moe_trace.placement.split import split_by  # noqa: E402
from moe_trace.read.file.folder import find_traces  # noqa: E402
from moe_trace.read.reader import read_recording  # noqa: E402

OPERATOR = "c10d::alltoall_base_"
PARAMETERS = "record_param_comms"
WHOLE_NUMBERS = ("long int", "long", "int", "Long", "Int")


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of hidden states, from its arguments."""

    start_us: float
    received: tuple[int, ...]
    """Number of rows from each rank."""


def exchanges(path: Path) -> list[Exchange]:
    """Return the all-to-alls of a trace, without those of integers, in order of time."""
    data = path.read_bytes()
    events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    found = [_of_parameters(e) for e in events if e.get("name") == PARAMETERS]
    if not any(found):
        found = [_of_operator(e) for e in events if e.get("name") == OPERATOR]
    return sorted((e for e in found if e is not None), key=lambda e: e.start_us)


def _of_operator(event: dict[str, Any]) -> Exchange | None:
    arguments = event.get("args", {})
    if "Concrete Inputs" not in arguments or arguments["Input type"][0] in WHOLE_NUMBERS:
        return None
    return Exchange(event["ts"], tuple(json.loads(arguments["Concrete Inputs"][3])))


def _of_parameters(event: dict[str, Any]) -> Exchange | None:
    arguments = event.get("args", {})
    if "all_to_all" not in str(arguments.get("Collective name")) or arguments.get("dtype") in WHOLE_NUMBERS:
        return None
    sizes = arguments.get("Out split size")
    sizes = json.loads(sizes) if isinstance(sizes, str) else sizes
    return Exchange(event["ts"], tuple(sizes)) if sizes else None


def received_rows(folder: Path) -> np.ndarray:
    """Return [S, L, R, R] dispatched rows that each rank (third axis) received from each rank (last axis).

    The dispatch is the first exchange inside a block's range, by the clock of the trace.
    """
    by_rank = {}
    for path in find_traces(folder):
        recording, found = read_recording(path), exchanges(path)
        starts = np.array([e.start_us for e in found])
        cells: dict[tuple[int, int], np.ndarray] = {}
        sites = sorted({(s.layer, s.site) for s in recording.samples})
        for sample in recording.samples:
            if sample.placement is None or "block" not in sample.placement.host:
                raise SystemExit(f"{path}: a call has no block range in the trace; record it with a profiler")
            block = sample.placement.host["block"]
            first = int(np.searchsorted(starts, block.start_us))
            if first == len(found) or found[first].start_us > block.end_us:
                raise SystemExit(
                    f"{path}: found a MoE layer without split sizes; record with record_shapes=True"
                )
            key = sample.step, sites.index((sample.layer, sample.site))
            cells[key] = cells.get(key, 0) + np.array(found[first].received)
        steps = sorted({step for step, _ in cells})
        by_rank[recording.rank] = np.array([[cells[s, i] for i in range(len(sites))] for s in steps])
    return np.stack([by_rank[rank] for rank in sorted(by_rank)], axis=2)


def check(folder: Path) -> tuple[str, bool]:
    """Return the report, and whether the load per rank was exact on the same steps."""
    counts = counts_of_traces(folder)
    measured_SLRR = received_rows(folder)
    measured_SLR = measured_SLRR.sum(axis=3)
    steps, layers, ranks = measured_SLR.shape
    plan = contiguous_plan(layers, counts.num_experts, Cluster(ranks))
    shares = plan.shares_LER()
    predicted_SLR = np.einsum("sle,ler->slr", counts.counts_SLE.astype(float), shares)
    wrong = np.abs(predicted_SLR - measured_SLR)
    lines = [
        f"{counts.model}: {steps} steps, {layers} layers, {ranks} ranks, {int(measured_SLR.sum()):,} rows "
        "received",
        f"same steps: {int((wrong > 0).sum())} of {wrong.size} loads differ, the largest by {wrong.max():g} "
        "rows",
    ]
    planned = np.full((steps, layers, ranks), np.nan)
    for fold in split_by(counts).folds:
        chosen = judge(plan, counts.counts_SLE[list(fold.chosen)])
        share_LR = chosen.loads_LR / chosen.loads_LR.sum(axis=1, keepdims=True)
        for step in fold.judged:
            planned[step] = share_LR * measured_SLR[step].sum(axis=1, keepdims=True)
    rows = [[layer.site, *_row(measured_SLRR[:, i], planned[:, i])] for i, layer in enumerate(counts.layers)]
    headings = ("layer", "max÷mean", "planned", "a step", "error", "largest", "moved", "model")
    lines += ["", "other steps, in every step (error: of a rank's load, in parts of the mean load)"]
    return "\n".join([*lines, table(headings, rows)]) + "\n", not wrong.any()


def _row(measured_SRR: np.ndarray, planned_SR: np.ndarray) -> list[str]:
    """Return the table row of one layer."""
    measured_SR = measured_SRR.sum(axis=2)
    ranks = measured_SR.shape[1]
    moved = 1 - np.trace(measured_SRR.sum(axis=0)) / measured_SRR.sum()
    error = np.abs(planned_SR - measured_SR) / measured_SR.mean(axis=1, keepdims=True)
    together = measured_SR.sum(axis=0)
    return [
        f"{together.max() / together.mean():.3f}",
        f"{_even(planned_SR):.3f}",
        f"{_even(measured_SR):.3f}",
        f"{100 * error.mean():.1f} %",
        f"{100 * error.max():.1f} %",
        f"{100 * moved:.1f} %",
        f"{100 * (ranks - 1) / ranks:.1f} %",
    ]


def _even(loads_SR: np.ndarray) -> float:
    """Return max ÷ mean, averaged over steps."""
    return float((loads_SR.max(axis=1) / loads_SR.mean(axis=1)).mean())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    text, exact = check(parser.parse_args().folder)
    print(text, end="")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
