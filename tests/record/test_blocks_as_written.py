"""Tests of common blocks, experts and wrappers: what is recorded is what the experts received."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts

EXPERTS, TOP_K = 8, 2
Change = Callable[[nn.Module], None]


def forwards(model: nn.Module, count: int = 9) -> None:
    for seed in range(count):
        model(**token_batch(2, 3, seed=seed))


def with_block(forward: Callable[[Any, Any], Any]) -> Change:
    """Has every block compute its tokens [T, H] by `forward(block, tokens)`."""

    def change(model: nn.Module) -> None:
        for layer in model.model.layers:  # type: ignore[union-attr,operator]
            layer.mlp.forward = types.MethodType(
                lambda block, hidden: forward(block, hidden.flatten(0, 1)).view_as(hidden), layer.mlp
            )

    return change


def drops_tokens(block: Any, tokens: Any) -> Any:
    _, weights, index = block.gate(tokens)
    kept, out = torch.arange(len(tokens)) % 3 != 0, torch.zeros_like(tokens)
    out[kept] = block.experts(tokens[kept], index[kept], weights[kept])
    return out


def writes_into_the_choice(block: Any, tokens: Any) -> Any:
    _, weights, index = block.gate(tokens)
    index.add_(1).remainder_(EXPERTS)
    return block.experts(tokens, index, weights)


def experts_that_write(model: nn.Module) -> None:
    """They map the experts' numbers to places, in the tensor that they were given."""
    for layer in model.model.layers:  # type: ignore[union-attr,operator]
        inner = layer.mlp.experts.forward

        def forward(hidden: Any, index: Any, weights: Any, inner: Any = inner) -> Any:
            out = inner(hidden, index, weights)
            index.fill_(0)
            return out

        layer.mlp.experts.forward = forward


@pytest.mark.parametrize(
    "change",
    [with_block(drops_tokens), with_block(writes_into_the_choice), experts_that_write],
    ids=["drops_tokens", "writes_into_the_choice", "experts_that_write"],
)
@pytest.mark.parametrize("after", [0, 20])
def test_a_choice_is_what_the_experts_were_given(change: Change, after: int) -> None:
    """From the first forward on, and from one on before which all were plain."""
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        forwards(model, after)
        tracer.samples()  # nothing waits
        change(model)
        forwards(model)
        tracer.samples()
        forwards(model)
    received = [c.assignments(EXPERTS) for c in calls]
    samples, lost = tracer.samples(), tracer.recording().lost
    rewritten = sum(one.get("rewritten", 0) for one in lost.calls.values())
    assert sum(map(len, lost.calls.values())) == (2 if rewritten else 0)
    assert rewritten in (0, 18) and (after or not rewritten)  # noticed once, and from then on copied
    assert [s.assignments.tolist() for s in samples] == [
        counts for call, counts in enumerate(received) if not 2 * after <= call < 2 * after + rewritten
    ]


def test_tokens_that_no_expert_is_given_are_skipped_slots() -> None:
    model = tiny_olmoe(layers=1)
    with_block(drops_tokens)(model)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        forwards(model, 1)
    (sample,) = tracer.samples()
    assert (sample.tokens, sample.skipped, sum(sample.assignments)) == (6, 2 * TOP_K, 4 * TOP_K)
    assert sample.router_entropy is None  # which logits were theirs is not known


def test_experts_that_layers_share_belong_to_the_router_before_them() -> None:
    model = tiny_olmoe(layers=2)
    first, second = (layer.mlp for layer in model.model.layers)
    second.experts, received, inner = first.experts, [], first.experts.forward

    def forward(hidden: Any, index: Any, weights: Any) -> Any:
        received.append(torch.bincount(index.flatten(), minlength=EXPERTS).tolist())
        return inner(hidden, index, weights)

    first.experts.forward = forward
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        forwards(model)
    assert [s.assignments.tolist() for s in tracer.samples()] == received
    lost = tracer.recording().lost
    assert not lost.calls and lost.experts_without_router == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_experts_that_are_checkpointed_alone_are_run_again_for_no_new_decision(reentrant: bool) -> None:
    model = tiny_olmoe(layers=2).train()

    def forward(block: Any, tokens: Any) -> Any:
        _, weights, index = block.gate(tokens)
        return checkpoint(block.experts, tokens, index, weights, use_reentrant=reentrant)

    with_block(forward)(model)
    with moe_trace.MoETracer(model) as tracer:
        for seed in range(3):
            model(**token_batch(2, 3, seed=seed)).logits.sum().backward()
    lost = tracer.recording().lost
    assert [s.phase for s in tracer.samples()] == ["forward"] * 6
    assert not lost.calls and lost.experts_without_router == 0


def test_a_later_hook_that_writes_into_a_routers_output_loses_nothing() -> None:
    model = tiny_olmoe(layers=2)
    gate = model.model.layers[0].mlp.gate

    def write(module: nn.Module, args: Any, output: Any) -> None:
        output[2].add_(3).remainder_(EXPERTS)

    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        forwards(model)
        gate.register_forward_hook(write)
        forwards(model)
    assert [s.assignments.tolist() for s in tracer.samples()] == [c.assignments(EXPERTS) for c in calls]
    assert not tracer.recording().lost.calls


class CountsFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_a_mode_of_the_users_sees_none_of_our_functions() -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), CountsFunctions() as plain:
        forwards(model, 40)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer, CountsFunctions() as traced:
        forwards(model, 40)
    assert len(tracer.samples()) == 80 and plain.calls == traced.calls > 0


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_the_same_program(strict: bool) -> None:
    model, batch = tiny_olmoe(layers=1), token_batch(1, 4)

    def program() -> list[str]:
        torch._dynamo.reset()
        exported = torch.export.export(model, (), {**batch, "use_cache": False}, strict=strict)
        return [str(node.target) for node in exported.graph.nodes]

    plain = program()
    with moe_trace.MoETracer(model):
        assert program() == plain
