"""Checks that apply to every framework's routers, called by the tests of each framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moe_trace
from moe_trace.cli import main

DIM, EXPERTS, TOP_K = 32, 8, 2


def randomised(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def recorded(model: nn.Module, run: Callable[[], Any]) -> list[moe_trace.RoutingSample]:
    with moe_trace.MoETracer(model) as tracer:
        run()
    samples, lost = tracer.samples(), tracer.recording().lost
    assert not lost.misread and not lost.calls, lost
    return samples


def counts(sample: moe_trace.RoutingSample) -> list[int]:
    return [int(n) for n in sample.assignments]


class RowsEntered:
    """An oracle: rows that enter each of some experts, by hooks of the test's own."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        self.experts = list(experts)
        self.rows = [0] * len(self.experts)
        for number, expert in enumerate(self.experts):
            expert.register_forward_pre_hook(lambda module, args, n=number: self._add(n, args[0]))

    def _add(self, number: int, rows: Tensor) -> None:
        self.rows[number] += rows.shape[0]

    def take(self) -> list[int]:
        """Since it was last asked."""
        rows, self.rows = self.rows, [0] * len(self.experts)
        return rows


class Layers(nn.Module):
    """Some blocks one behind the other; what a block returns first goes on."""

    def __init__(self, blocks: Iterable[nn.Module], call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.call = call or (lambda block, x: block(x))
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recompute:
                out = checkpoint(self.call, layer, x, use_reentrant=False)
            else:
                out = self.call(layer, x)
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x


def in_traces(folder: Path) -> list[list[list[int]]]:
    """Each trace below a folder, in the order of their names: the counts of each call in it."""
    traces = []
    for path in sorted(folder.rglob("*.json*")):
        recording = moe_trace.read_recording(path)
        assert not recording.lost.samples_without_range and not recording.lost.misread, path
        traces.append([counts(sample) for sample in recording.samples])
    return traces


def computes_the_same(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Output and gradients are equal to the bit with and without the tracer."""
    found = []
    for traced in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        if traced:
            with moe_trace.MoETracer(model):
                out = run()
                out.float().square().sum().backward()
        else:
            out = run()
            out.float().square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((out.detach().clone(), grads))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() != set()
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


def recomputes_the_same(model: Layers, x: Tensor) -> None:
    """Under activation checkpointing each decision is recorded twice, the second time as a recomputation."""
    model.recompute = True
    samples = recorded(model, lambda: model(x).square().sum().backward())
    model.recompute = False
    forward = [counts(s) for s in samples if s.phase == "forward"]
    again = [counts(s) for s in samples if s.phase == "recompute"]
    assert len(forward) == len(model.layers) and again == forward[::-1]


def report_shows_every_layer(
    model: nn.Module, run: Callable[[], Any], tmp_path: Path, capsys: Any, *, timed: bool = True
) -> None:
    """The trace of a profiler session, as `moe-trace report` reads it; in a graph no router has a time."""
    path = tmp_path / "trace.json"
    with moe_trace.MoETracer(model) as tracer:
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as prof:
            tracer.attach(prof)
            run()
        prof.export_chrome_trace(str(path))
    capsys.readouterr()
    assert main(["report", str(path)]) == 0
    shown = capsys.readouterr().out
    summary = moe_trace.read_summary(path)
    assert [router.info.name for router in summary.routers] == [site.name for site in tracer.sites]
    assert not summary.lost.samples_without_range and not summary.lost.ranges_without_sample
    for router in summary.routers:
        assert router.info.site in shown
        assert router.calls > 0 and (router.latency.host is not None) == timed


def flops_are_those_that_torch_counts(model: nn.Module, run: Callable[[], Any]) -> None:
    """Of blocks that hold nothing but routers and experts, with experts that torch's counter sees."""
    infos = [site.info for site in moe_trace.find_routers(model)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        samples = recorded(model, run)
    shared = sum(i.shared_flops_per_token * s.tokens for i, s in zip(infos, samples, strict=True))
    ours = sum(sample.router_flops + sample.expert_flops for sample in samples)
    assert ours + shared == counter.get_total_flops() > 0
