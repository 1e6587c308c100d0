"""Tests of hand-written mixtures of experts: counts are what each expert received, or there are none."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import hand_written as written
import moe_trace
from hand_written import DIM, MoE
from moe_trace.data.errors import NoRoutersFound

SHAPES = [(2, 9, DIM), (1, 1, DIM), (3, 2, DIM), (4, 40, DIM)]


def truths_and_samples(moe: MoE) -> tuple[list[list[int]], list[list[int]], moe_trace.Recording]:
    """What the block says it did in each call, and what was recorded."""
    truths: list[list[int]] = []
    moe.register_forward_hook(lambda module, args, output: truths.append(list(module.truth)))
    model = nn.Sequential(moe) if not isinstance(moe, written.Mixtral) else moe
    device = next(moe.parameters()).device
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with moe_trace.MoETracer(model) as tracer:
            for shape in SHAPES:
                for _ in range(3):
                    model(torch.randn(shape, device=device))
        found = [[int(n) for n in sample.assignments] for sample in tracer.samples()]
    return truths, found, tracer.recording()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", written.COUNTED)
def test_counts_are_the_tokens_that_each_expert_worked_on(kind: type[MoE], training: bool) -> None:
    torch.manual_seed(0)
    truths, found, recording = truths_and_samples(kind().train(training))
    assert found == truths
    assert not recording.lost.calls and not recording.lost.misread


@pytest.mark.cuda
@pytest.mark.parametrize("kind", written.COUNTED)
def test_counts_on_a_gpu_are_the_tokens_that_each_expert_worked_on(kind: type[MoE]) -> None:
    torch.manual_seed(0)
    truths, found, recording = truths_and_samples(kind().cuda())
    assert found == truths
    assert not recording.lost.calls and not recording.lost.misread


@pytest.mark.parametrize("kind", written.REFUSED)
def test_what_cannot_be_told_is_refused_and_never_wrong(kind: type[MoE]) -> None:
    torch.manual_seed(0)
    truths, found, recording = truths_and_samples(kind())
    lost = recording.lost
    assert len(found) < len(truths)
    assert lost.misread or lost.never_called
    left = iter(truths)
    assert all(any(one == truth for truth in left) for one in found), "a wrong count"
    assert len(found) + sum(sum(reasons.values()) for reasons in lost.calls.values()) in (len(truths), 0)
    assert all("found" in why for why in lost.misread.values())


def test_experts_that_run_again_in_the_backward_are_not_counted_twice() -> None:
    model = nn.Sequential(written.CheckpointsEachExpert(), written.NanoMoE()).train()
    truths: list[list[int]] = []
    for block in model:
        block.register_forward_hook(lambda module, args, output: truths.append(list(module.truth)))
    with moe_trace.MoETracer(model) as tracer:
        for _ in range(3):
            model(torch.randn(2, 9, DIM)).sum().backward()
    assert [sample.assignments.tolist() for sample in tracer.samples()] == truths


def test_experts_that_two_gates_share_are_refused() -> None:
    first, second = written.NanoMoE(), written.NanoMoE()
    second.experts = first.experts
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with moe_trace.MoETracer(nn.Sequential(first, second)) as tracer:
            tracer.model(torch.randn(2, 9, DIM))
    assert tracer.samples() == [] and set(tracer.recording().lost.misread) == {"0.gate", "1.gate"}


@pytest.mark.parametrize("kind", [written.NanoMoE, written.BySlot, written.MiniMind])
def test_compiled_blocks_are_counted_truly_or_said_to_be_unread(kind: type[MoE]) -> None:
    """A graph does not know how many rows enter a module; a router's own ids it does."""
    model = nn.Sequential(kind().eval(), kind().eval())
    truths: list[list[int]] = []
    for block in model:
        block.register_forward_hook(lambda module, args, output: truths.append(list(module.truth)))
        block.compile(backend="eager")
    with torch.no_grad(), warnings.catch_warnings(), moe_trace.MoETracer(model) as tracer:
        warnings.simplefilter("ignore")
        for _ in range(2):
            model(torch.randn(2, 9, DIM))
    lost = tracer.recording().lost
    if kind is written.MiniMind:
        assert [sample.assignments.tolist() for sample in tracer.samples()] == truths
    else:
        assert set(lost.misread) == {"0.gate", "1.gate"} and not lost.never_called
        assert all("Run those blocks eagerly" in why for why in lost.misread.values())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (written.GateIsAParameter, "its gate is a parameter, `w_gate`"),
        (written.MultiGate, "no module named gate or router"),
        (written.TwoGates, "text_gate, image_gate may each be its router"),
        (written.NestedGroups, "outer_gate, inner_gate may each be its router"),
    ],
)
def test_the_error_names_what_looks_like_one_and_why_it_was_not_taken(kind: type[MoE], why: str) -> None:
    with pytest.raises(NoRoutersFound) as raised:
        moe_trace.find_routers(nn.Sequential(kind()))
    assert why in str(raised.value)
    assert f"0 ({kind.__name__}" in str(raised.value)
