"""Routing metrics as TensorBoard scalars."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.table import CallTable, load_by_step
from moe_trace.data.display.load_picture import load_picture
from moe_trace.data.schema import RoutingSample

IntArray = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

IMAGE_TAG = "moe_load/layers_x_experts"
IMAGES_MAX = 10  # shown per tag by TensorBoard's default


def load_writer() -> Any:
    """Return torch's `SummaryWriter`. The first import takes a second or two: call it before training."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def write_scalars(
    folder: str | os.PathLike[str], samples: Sequence[RoutingSample], *, first_step: int = 0
) -> None:
    """Write `moe_<metric>/<site>` and `moe_<metric>/mean` for each step, through torch's SummaryWriter.

    For some steps, also write an image of every expert's load, layers x experts.
    """
    if not samples:
        return
    with load_writer()(log_dir=str(folder)) as writer:
        add_scalars(writer, samples, first_step=first_step)
        for step, loads in step_loads(samples, IMAGES_MAX).items():
            writer.add_image(IMAGE_TAG, load_picture(loads), global_step=step + first_step, dataformats="HWC")


def add_scalars(writer: Any, samples: Sequence[RoutingSample], *, first_step: int = 0) -> None:
    """Write one event per step, in a tenth of the time of separate `add_scalar` calls, which hold the GIL."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for step, points in itertools.groupby(scalar_points(samples), key=lambda point: point[2]):
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value, _ in points]
        writer.file_writer.add_summary(Summary(value=values), step + first_step)


def scalar_points(samples: Sequence[RoutingSample]) -> Iterator[tuple[str, float, int]]:
    """Yield (tag, value, step) for each step and router, over all its calls in the step, and their mean."""
    calls = CallTable.of(samples)
    keys = sorted(calls.keys)
    steps, figures = _figures(calls, [key.name for key in keys])
    for i, step in enumerate(steps.tolist()):
        values: dict[str, list[float]] = defaultdict(list)
        for layer, key in enumerate(keys):
            for group, table_SL in figures.items():
                value = float(table_SL[i, layer])
                if value == value:
                    values[group].append(value)
                    yield f"moe_{group}/{key.site}", value, step
        for group, numbers in values.items():
            yield f"moe_{group}/mean", sum(numbers) / len(numbers), step


def _figures(calls: CallTable, names: Sequence[str]) -> tuple[IntArray, dict[str, Floats]]:
    """Return the steps, [S], and each metric, `[S, L]`; NaN where a step has no value."""
    steps, loads_SLE = load_by_step(calls, names)
    calls = calls.take(calls.forward)
    row = {name: i for i, name in enumerate(names)}
    layer = np.array([row[key.name] for key in calls.keys], np.int64)[calls.router]
    step = np.searchsorted(steps, calls.step)

    def total(values: npt.NDArray) -> Floats:
        found: Floats = np.zeros((len(steps), len(names)))
        np.add.at(found, (step, layer), values)
        return found

    def mean(figure: str, weight: npt.NDArray) -> Floats:
        known = ~np.isnan(calls.numbers[figure])
        return total(np.where(known, calls.numbers[figure] * weight, 0)) / total(weight * known)

    experts_L = np.zeros(len(names), np.int64)
    np.maximum.at(experts_L, layer, calls.assignments.sizes)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where there is no data
        mean_SL = loads_SLE.sum(2) / experts_L
        there_LE = np.arange(loads_SLE.shape[2]) < experts_L[:, None]
        variance_SL = ((loads_SLE - mean_SL[..., None]) ** 2 * there_LE).sum(2) / experts_L
        tokens = calls.tokens - calls.nonfinite_tokens
        return steps, {
            "load_max_over_mean": loads_SLE.max(2, initial=0) / mean_SL,
            "load_cv": np.sqrt(variance_SL) / mean_SL,
            "router_entropy": mean("router_entropy", tokens),
            "router_confidence": mean("confidence", tokens),
            "skipped_share": total(calls.skipped) / total(calls.tokens * calls.top_k),
            "aux_loss": mean("aux_loss", np.ones(len(calls))),
        }


def step_loads(samples: Sequence[RoutingSample], steps_max: int) -> dict[int, list[npt.NDArray[np.int64]]]:
    """Return the assignments of each layer by step, for at most `steps_max` evenly spaced steps."""
    calls = CallTable.of(samples)
    calls = calls.take(calls.forward)
    used = [calls.keys[router] for router in np.unique(calls.router).tolist()]
    keys = sorted(used, key=lambda key: (key.layer, key.site))
    steps, loads_SLE = load_by_step(calls, [key.name for key in keys])
    sizes = [int(calls.assignments.sizes[calls.of_router(key.name)].max()) for key in keys]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(steps_max, len(steps))).astype(np.int64))
    return {
        int(steps[i]): [load_E[:size] for load_E, size in zip(loads_SLE[i], sizes, strict=True)]
        for i in chosen
    }
