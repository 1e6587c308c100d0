"""Tests that each loss is counted with a reason, and that following the advice in its note removes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.data.errors import UsageError
from moe_trace.data.schema import Lost
from moe_trace.data.summary_notes import LOST_CALLS

TESTED_ELSEWHERE = {
    "rewritten": "test_plain_forwards.py",
    "replaced": "test_kinds_of_use.py",
    "unjoined": "test_joined_by_identity.py",
    "interrupted": "test_stopped_and_detached.py",
    "unreduced": "test_kinds_of_use.py",
    "not_reached": "test_as_users_do.py",
    "silent_forwards": "test_compiled.py",
}
NOTHING_TO_DO = {"without_experts", "hook_failure"}
OF_THE_TRACE = {"samples_without_range", "without_range", "ranges_without_sample", "unplaced", "untimed"}
"""See `test_remedies_of_traces.py`. Routers that compiled code fuses have no time, whatever one does."""
NO_LOSSES = {"calls_seen", "calls"}


def run(model: nn.Module, count: int = 6) -> int:
    """Runs the model; returns how many router calls it made."""
    with torch.no_grad():
        for seed in range(count):
            model(**token_batch(2, 3, seed=seed))
    return count * len(model.model.layers)  # type: ignore[union-attr,arg-type]


def traced(model: nn.Module, **options: Any) -> tuple[Lost, str, int, int]:
    """(what was lost, the notes, calls made, calls recorded)."""
    with moe_trace.MoETracer(model, **options) as tracer:
        made = run(model)
    return tracer.recording().lost, " ".join(tracer.summary().notes), made, len(tracer.samples())


def test_overwritten() -> None:
    model = tiny_olmoe(layers=2)
    lost, note, made, kept = traced(model, capacity=4)
    assert lost.overwritten == made - kept == 8 and "raise capacity=" in note
    lost, note, made, kept = traced(model, capacity=made)
    assert lost.overwritten == 0 and kept == made and "dropped" not in note


@pytest.fixture
def other_form() -> Iterator[nn.Module]:
    model = tiny_olmoe(layers=1)
    block: Any = model.model.layers[0].mlp
    gate, experts = block.gate.forward, block.experts.forward
    block.gate.forward = lambda hidden: (gate(hidden)[0], *gate(hidden)[:0:-1])  # index before weights
    block.experts.forward = lambda hidden, weights, index: experts(hidden, index, weights)
    yield model
    with suppress(UsageError):
        moe_trace.unregister_adapter("swapped")


def test_unreadable(other_form: nn.Module) -> None:
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        lost, note, made, kept = traced(other_form)
    assert [*lost.calls.values()] == [{"unreadable": made}] and kept == 0
    assert "moe_trace.register_adapter" in note

    def read(call: Any) -> Any:
        _, weights, index = call.experts_args
        return moe_trace.RouterOutput(index, weights, call.router_output[0])

    router = type(other_form.model.layers[0].mlp.gate)  # type: ignore[union-attr,index]
    moe_trace.register_adapter("swapped", router=router, experts="experts", read=read)
    lost, note, made, kept = traced(other_form)
    assert kept == made and not lost.calls and not lost.misread


def test_never_called() -> None:
    model = tiny_olmoe(layers=2)
    layers, model.model.layers = model.model.layers, model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.model.config.num_hidden_layers = 1
    tail = nn.ModuleList([model.model.layers, layers[1:]])
    holder = nn.Module()
    holder.model, holder.tail = model, tail
    with moe_trace.MoETracer(holder) as tracer:
        run(model)
    assert len(tracer.recording().lost.never_called) == 1
    with moe_trace.MoETracer(model) as tracer:  # those that run are all that there is
        made = run(model)
    assert len(tracer.samples()) == made and not tracer.recording().lost.never_called


def test_experts_without_router() -> None:
    model = tiny_olmoe(layers=1)
    block = model.model.layers[0].mlp
    hidden = torch.randn(5, model.config.hidden_size)
    with torch.no_grad():
        _, weights, index = block.gate(hidden)
        with moe_trace.MoETracer(model) as tracer:
            block.experts(hidden, index, weights)
    lost = tracer.recording().lost
    assert lost.experts_without_router == 1
    assert "call them through their block" in " ".join(tracer.summary().notes)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        block(hidden.unsqueeze(0))
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(8) for c in calls]
    assert tracer.recording().lost.experts_without_router == 0


def test_padding_unknown() -> None:
    model, batch = tiny_olmoe(layers=1), token_batch(2, 6)
    batch["attention_mask"][0, :2] = 0
    wide = batch["attention_mask"][:, None, None, :].expand(2, 1, 6, 6).bool().tril()
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(input_ids=batch["input_ids"], attention_mask=wide)
    assert tracer.recording().lost.padding_unknown == 1
    assert "pass a 2-D mask" in " ".join(tracer.summary().notes)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**batch)
    assert tracer.recording().lost.padding_unknown == 0
    assert [s.padding_assignments for s in tracer.samples()] == [2 * model.config.num_experts_per_tok]


def test_every_loss_is_in_one_of_these_lists() -> None:
    here = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    named = {"misread": "unreadable"}  # why the first such call could not be read
    losses = LOST_CALLS.keys() | {named.get(one.name, one.name) for one in fields(Lost)}
    losses -= OF_THE_TRACE | NO_LOSSES | NOTHING_TO_DO
    assert losses - TESTED_ELSEWHERE.keys() - here == set()
    assert (TESTED_ELSEWHERE.keys() | NOTHING_TO_DO | OF_THE_TRACE) <= LOST_CALLS.keys() | {
        one.name for one in fields(Lost)
    }
