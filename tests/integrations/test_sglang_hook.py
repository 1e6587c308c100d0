"""Tests of the hook for SGLang's `--forward-hooks`, registered as in `hook_manager.py`; not run on SGLang."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import moe_trace
from hand_written import DIM, Mixtral

FACTORY = "moe_trace.integrations.sglang.hook:trace_while_profiled"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixtral() for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)[0]
        return hidden


class CausalLM(nn.Module):
    """SGLang calls `forward` of the root itself, so that no hook on it runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(hidden)


@contextmanager
def hooked(inner: nn.Module, config: dict[str, Any] | None = None) -> Iterator[CausalLM]:
    causal = CausalLM(inner)
    module, name = FACTORY.split(":")
    factory = getattr(importlib.import_module(module), name)
    target = dict(causal.named_modules())["model"]
    handle = target.register_forward_pre_hook(factory(config or {}), with_kwargs=False)
    yield causal
    handle.remove()


def forwards(causal: CausalLM, count: int) -> None:
    with torch.no_grad():
        for _ in range(count):
            causal.forward(torch.randn(1, 9, DIM))


def hooks_on(causal: CausalLM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in causal.modules())


def test_each_profile_has_the_routing_of_its_forwards(tmp_path: Path) -> None:
    with hooked(Layers()) as causal:
        forwards(causal, 3)
        assert hooks_on(causal) == 1
        for session in range(2):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                forwards(causal, 4)
            forwards(causal, 2)  # the first of them tells that it ended
            assert hooks_on(causal) == 1
            profiler.export_chrome_trace(str(tmp_path / f"{session}.json"))
            recording = moe_trace.read_recording(tmp_path / f"{session}.json")
            placed = [sample for sample in recording.samples if sample.placement is not None]
            assert len(placed) == 8, "4 forwards, 2 layers"
            assert not recording.lost.calls


def test_a_model_without_routers_is_warned_of_once() -> None:
    with hooked(nn.Linear(DIM, DIM)) as causal:
        with pytest.warns(RuntimeWarning, match="found 0 routers"):
            forwards(causal, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            forwards(causal, 2)
