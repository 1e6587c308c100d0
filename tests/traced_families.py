"""Runs of the bench under the tracer, each with the truth about it; shared by the tests of the families."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moe_trace
from families.configs import FAMILIES
from families.family import Family
from families.flops_oracle import CallFlops, count_flops
from families.oracle import Intervention, Truth
from moe_trace.data.schema import RouterInfo, RoutingSample

ROUTED = [family for family in FAMILIES if "no-router" not in family.traits]
HONEST = [family for family in ROUTED if "defect" not in family.traits]
"""Families whose experts compute what the router declares."""

LOGITS_ELEMENT = {"topk-experts": 0, "one-hot": 2, "dense-scores": 1, "sorted-dispatch": 4}


def named(families: list[Family]) -> Any:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


@dataclass(frozen=True)
class Recorded:
    """One traced run, and the truth about it."""

    samples: dict[tuple[str, int], RoutingSample]
    infos: dict[str, RouterInfo]
    truths: list[Truth]
    logits: list[torch.Tensor]
    """What the routers returned as logits, in the order of the calls; see `LOGITS_ELEMENT`."""

    def of(self, truth: Truth) -> RoutingSample:
        """The sample of the same call."""
        name = truth.router_path
        return self.samples.get((name, truth.call)) or self.samples[f"{name}.router_gate", truth.call]

    def real_assignments(self, sample: RoutingSample) -> list[int]:
        """Without identity experts, on which no weight can be scaled."""
        return sample.assignments[
            : len(sample.assignments) - self.infos[sample.name].identity_experts
        ].tolist()


def record(family: Family, model: nn.Module, run: Any, *, replay_in_float32: bool = False) -> Recorded:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a router that cannot be read is switched off
        tracer = moe_trace.MoETracer(model)
        logits: list[torch.Tensor] = []
        handles = [s.router.register_forward_hook(_keep_logits(family, logits)) for s in tracer.sites]
        with Intervention(model) as watch, tracer:
            run()
    for handle in handles:
        handle.remove()
    recording = tracer.recording()
    assert recording.lost.misread == {}
    if replay_in_float32:
        model.float()
        watch.calls[:] = [replace(call, args=cast_floats(call.args, torch.float32)) for call in watch.calls]
    return Recorded(
        samples={(sample.name, sample.call): sample for sample in recording.samples},
        infos={info.name: info for info in recording.routers},
        truths=watch.truths(),
        logits=logits,
    )


def cast_floats(values: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Tensors of floats in another type; what else there is stays."""
    return tuple(
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in values
    )


def _keep_logits(family: Family, kept: list[torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        logits = output if isinstance(output, torch.Tensor) else output[LOGITS_ELEMENT[family.contract]]
        kept.append(logits.detach().double().reshape(-1, logits.shape[-1]).clone())

    return hook


@functools.cache
def recorded(family: Family) -> Recorded:
    """One plain forward."""
    model = family.build()
    return record(family, model, lambda: family.run(model))


@functools.cache
def counted(family: Family) -> list[CallFlops]:
    model = family.build()
    return count_flops(model, lambda: family.run(model))


def assert_true(seen: Recorded) -> None:
    """Call by call: the same assignments, and every slot accounted for."""
    assert len(seen.samples) == len(seen.truths)
    for truth in seen.truths:
        sample = seen.of(truth)
        assert sample.tokens == truth.tokens
        assert seen.real_assignments(sample) == truth.assignments.tolist()
        assert sample.assignments.sum() == sample.tokens * sample.top_k - sample.skipped
        assert (sample.k_histogram * np.arange(sample.top_k + 1)).sum() == sample.assignments.sum()
