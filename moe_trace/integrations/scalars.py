"""Routing figures as TensorBoard scalars."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from moe_trace.data.loads import coefficient_of_variation, max_over_mean
from moe_trace.data.schema import RoutingSample
from moe_trace.integrations.load_image import load_picture, step_loads

# One figure is one group of TensorBoard's scalar dashboard, with the layers and their mean inside.
_GROUPS = (
    "load_max_over_mean",
    "load_cv",
    "router_entropy",
    "router_confidence",
    "skipped_share",
    "aux_loss",
)

IMAGE_TAG = "moe_load/layers_x_experts"
IMAGES_MAX = 10  # TensorBoard shows no more of one tag, unless it is asked to


def write_scalars(folder: str | os.PathLike[str], samples: Sequence[RoutingSample]) -> None:
    """Write `moe_<figure>/<site>` and `moe_<figure>/mean` for each step, through torch's SummaryWriter.

    And a picture of every expert's load, layers x experts, for some steps.
    """
    if not samples:
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(folder)) as writer:
        add_scalars(writer, samples)
        for step, loads in step_loads(samples, IMAGES_MAX).items():
            writer.add_image(IMAGE_TAG, load_picture(loads), global_step=step, dataformats="HWC")


def add_scalars(writer: Any, samples: Iterable[RoutingSample]) -> None:
    """One event a step: a tenth of the time of `add_scalar` for each, which holds Python's lock."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for step, points in itertools.groupby(scalar_points(samples), key=lambda point: point[2]):
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value, _ in points]
        writer.file_writer.add_summary(Summary(value=values), step)


def scalar_points(samples: Iterable[RoutingSample]) -> Iterator[tuple[str, float, int]]:
    """(tag, value, step): per step and router, all calls of the step taken together, and their mean."""
    steps: dict[int, dict[str, list[RoutingSample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.phase == "forward":
            steps[sample.step][sample.site].append(sample)
    for step, sites in sorted(steps.items()):
        values: dict[str, list[float]] = defaultdict(list)
        for site, calls in sorted(sites.items()):
            for group, value in _figures(calls).items():
                values[group].append(value)
                yield f"moe_{group}/{site}", value, step
        for group, numbers in values.items():
            yield f"moe_{group}/mean", sum(numbers) / len(numbers), step


def _figures(calls: Sequence[RoutingSample]) -> dict[str, float]:
    loads_E = np.stack([call.assignments for call in calls]).sum(0, dtype=np.float64)
    assigned = bool(loads_E.any())
    slots = sum(call.tokens * call.top_k for call in calls)
    found: dict[str, float | None] = {
        "load_max_over_mean": max_over_mean(loads_E) if assigned else None,
        "load_cv": coefficient_of_variation(loads_E) if assigned else None,
        "router_entropy": _mean(calls, "router_entropy"),
        "router_confidence": _mean(calls, "confidence"),
        "skipped_share": sum(call.skipped for call in calls) / slots if slots else None,
    }
    losses = [call.aux_loss for call in calls if call.aux_loss is not None]
    found["aux_loss"] = sum(losses) / len(losses) if losses else None
    return {group: value for group in _GROUPS if (value := found[group]) is not None}


def _mean(calls: Sequence[RoutingSample], figure: str) -> float | None:
    weighted = [
        (value, call.tokens - call.nonfinite_tokens)
        for call in calls
        if (value := getattr(call, figure)) is not None
    ]
    tokens = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / tokens if tokens else None
