"""Tests that decisions are joined with experts by memory, block and thread, or counted as lost."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_trace
from models import tiny_olmoe, token_batch

EXPERTS = 8
Block = Callable[[Any, torch.Tensor], torch.Tensor]


class Received(dict[int, list[list[int]]]):
    """By layer: tokens per expert of each call that the experts' own forward was given."""


@contextmanager
def received(model: nn.Module) -> Iterator[Received]:
    """Wraps the forward of the experts' class, beneath all hooks."""
    layers = [layer.mlp.experts for layer in model.model.layers]  # type: ignore[union-attr]
    of, kind, calls = {id(one): n for n, one in enumerate(layers)}, type(layers[0]), Received()
    inner = kind.forward

    @functools.wraps(inner)
    def forward(self: Any, hidden: Any, index: Any, weights: Any) -> Any:
        if torch.compiler.is_compiling():
            return inner(self, hidden, index, weights)
        counts = torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
        out = inner(self, hidden, index, weights)
        calls.setdefault(of[id(self)], []).append(counts)
        return out

    kind.forward = forward
    try:
        yield calls
    finally:
        kind.forward = inner


def with_block(model: nn.Module, block: Block) -> None:
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.forward = types.MethodType(
            lambda self, hidden: block(self, hidden.flatten(0, 1)).view_as(hidden), layer.mlp
        )


def run(model: nn.Module, count: int = 6) -> None:
    with torch.no_grad():
        for seed in range(count):
            model(**token_batch(2, 3, seed=seed))


def by_layer(tracer: moe_trace.MoETracer) -> dict[int, list[list[int]]]:
    """As `Received`, without what checkpointing computes again."""
    found: dict[int, list[list[int]]] = {}
    for sample in tracer.samples():
        if sample.phase == "forward":
            found.setdefault(sample.layer, []).append(sample.assignments.tolist())
    return found


def check(tracer: moe_trace.MoETracer, calls: Received, *, all_of_them: bool = True) -> None:
    """Nothing is recorded that the experts did not receive, and every router call is accounted for."""
    found, lost = by_layer(tracer), tracer.recording().lost
    for layer in calls.keys() | found.keys():
        extra = Counter(map(tuple, found.get(layer, []))) - Counter(map(tuple, calls.get(layer, [])))
        assert not extra, f"layer {layer}"
    names = {site.layer: site.name for site in tracer.sites}
    for layer, name in names.items():
        recorded = len(found.get(layer, []))
        assert lost.calls_seen.get(name, 0) == recorded + sum(lost.calls.get(name, {}).values())
    if all_of_them:
        assert found == calls
        assert not lost.calls and lost.experts_without_router == 0


def elsewhere(pool: ThreadPoolExecutor, changed: bool) -> Block:
    """Experts on another thread, which the block waits for."""

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        if changed:
            index, weights = (index + 1) % EXPERTS, weights * 0.5

        def go() -> torch.Tensor:
            with torch.no_grad():
                return self.experts(tokens, index, weights)

        return pool.submit(go).result()

    return block


@pytest.mark.parametrize("changed", [False, True])
def test_experts_that_their_block_waits_for_on_another_thread(changed: bool) -> None:
    model = tiny_olmoe(layers=2)
    with ThreadPoolExecutor(2) as pool, received(model) as calls, moe_trace.MoETracer(model) as tracer:
        with_block(model, elsewhere(pool, changed))
        run(model)
    check(tracer, calls)


@pytest.mark.parametrize("profiled", [False, True])
def test_experts_that_outlive_their_forward_are_not_given_to_the_next_one(profiled: bool) -> None:
    """Those of each forward run while the next one is between the gate and the experts of its block."""
    model = tiny_olmoe(layers=2)
    late: list[Any] = []

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        if len(late) == 2:
            pool.submit(late.pop(0)).result()

        def go() -> None:
            with torch.no_grad():
                self.experts(tokens, (index + 3) % EXPERTS, weights.clone())

        late.append(go)
        return tokens

    with_block(model, block)
    with ThreadPoolExecutor(1) as pool, received(model) as calls:
        with moe_trace.profile(model) if profiled else moe_trace.MoETracer(model) as traced:
            run(model, 1)
            first = [*late]
            run(model, 5)
            for go in late:
                pool.submit(go).result()
    assert len(first) == 2
    tracer = traced.tracer if profiled else traced
    lost = tracer.recording().lost
    assert not by_layer(tracer)
    assert [reasons for reasons in lost.calls.values()] == [{"unjoined": 6}] * 2
    assert lost.experts_without_router == 12 == sum(map(len, calls.values()))
    check(tracer, calls, all_of_them=False)
    assert "wait for them inside the block" in " ".join(tracer.summary().notes)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("where", ["a later pre-hook", "another thread", "the same thread"])
@pytest.mark.parametrize("before", [1, 3])
def test_experts_that_outlive_the_first_forwards(before: int, where: str, asked: bool) -> None:
    """Until then a block without experts can only be a fused one: those calls alone are taken back."""
    model = tiny_olmoe(layers=2)
    late: list[Any] = []

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        late.append(lambda: no_grad(self.experts, tokens, (index + 3) % EXPERTS, weights.clone()))
        return tokens

    def work_off(*_: Any) -> None:
        while late:
            go = late.pop(0)
            if where == "another thread":
                pool.submit(go).result()
            else:
                go()

    with_block(model, block)
    with ThreadPoolExecutor(1) as pool, received(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model, before)
        if asked:
            assert len(tracer.samples()) == 2 * before
        for layer in model.model.layers:
            del layer.mlp.forward
        if where == "a later pre-hook":
            model.model.embed_tokens.register_forward_pre_hook(work_off)
        else:
            work_off()
        run(model, 5)
    lost = tracer.recording().lost
    assert by_layer(tracer) == {layer: counts[before:] for layer, counts in calls.items()}
    assert list(lost.calls.values()) == [{"unjoined": before}] * 2
    assert lost.experts_without_router == 2 * before
    check(tracer, calls, all_of_them=False)
    assert "wait for them inside the block" in " ".join(tracer.summary().notes)


def test_experts_called_by_hand_take_back_no_more_calls_than_they_are() -> None:
    model = tiny_olmoe(layers=1)
    experts = model.model.layers[0].mlp.experts

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        return self.experts.forward(tokens, index, weights)

    with_block(model, block)
    with received(model) as calls, moe_trace.MoETracer(model, capacity=4) as tracer:
        run(model, 6)
        no_grad(experts, torch.randn(1, 32), torch.tensor([[0, 1]]), torch.ones(1, 2))
        lost = tracer.recording().lost
        assert by_layer(tracer)[0] == calls[0][2:6]
        assert (lost.experts_without_router, lost.overwritten) == (1, 2)
        assert lost.calls == {"model.layers.0.mlp.gate": {"overwritten": 2}}
        for _ in range(2):
            no_grad(experts, torch.randn(1, 32), torch.tensor([[0, 1]]), torch.ones(1, 2))
        assert by_layer(tracer)[0] == calls[0][3:6]
        assert tracer.recording().lost.calls == {"model.layers.0.mlp.gate": {"overwritten": 2, "unjoined": 1}}
        del model.model.layers[0].mlp.forward
        run(model, 2)
    assert by_layer(tracer)[0] == calls[0][-2:]
    lost = tracer.recording().lost.calls["model.layers.0.mlp.gate"]
    assert lost == {"overwritten": 3, "unjoined": 3}  # as its experts are a module that is called, after all
    check(tracer, calls, all_of_them=False)


def test_a_block_that_skips_its_experts_at_first_has_assigned_nothing() -> None:
    model, skipping = tiny_olmoe(layers=2), [True]

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        return tokens if skipping[0] else self.experts(tokens, index, weights)

    with_block(model, block)
    with received(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model, 3)
        skipping[0] = False
        run(model, 6)
    assert by_layer(tracer) == calls
    assert list(tracer.recording().lost.calls.values()) == [{"unjoined": 3}] * 2
    check(tracer, calls, all_of_them=False)


def test_each_of_two_threads_runs_the_experts_of_the_others_router() -> None:
    """Told by the memory of what they received: by thread, each would get the other's."""
    model = tiny_olmoe(layers=1)
    block = model.model.layers[0].mlp
    torch.manual_seed(0)
    with torch.no_grad(), received(model) as calls, moe_trace.MoETracer(model) as tracer:
        for _ in range(8):
            given = []
            with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
                for pool in (one, two):
                    tokens = torch.randn(5, model.config.hidden_size)
                    given.append((tokens, *pool.submit(no_grad, block.gate, tokens).result()[:0:-1]))
                for pool, own in ((two, given[0]), (one, given[1])):
                    pool.submit(no_grad, block.experts, *own).result()
    logits_of = {tuple(s.assignments.tolist()): s.router_entropy for s in tracer.samples()}
    assert {*map(tuple, calls[0])} == {*logits_of}
    check(tracer, calls, all_of_them=False)
    assert not tracer.recording().lost.calls and tracer.recording().lost.experts_without_router == 0
    for counts, tokens in zip(calls[0][-2:], (given[0][0], given[1][0]), strict=True):
        with torch.no_grad():
            p = block.gate(tokens)[0].float().softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean().item()
        assert logits_of[tuple(counts)] == pytest.approx(entropy, rel=1e-4)


def no_grad(function: Any, *args: Any) -> Any:
    with torch.no_grad():
        return function(*args)


def test_experts_that_somebody_else_calls_meanwhile_belong_to_no_router() -> None:
    model = tiny_olmoe(layers=1)

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        pool.submit(no_grad, self.experts, tokens, index * 0 + torch.tensor([1, 2]), weights * 2).result()
        return self.experts(tokens, index, weights)

    with ThreadPoolExecutor(1) as pool, received(model) as calls, moe_trace.MoETracer(model) as tracer:
        with_block(model, block)
        run(model)
    assert by_layer(tracer)[0] == calls[0][1::2]
    lost = tracer.recording().lost
    assert not lost.calls and lost.experts_without_router == 6


@pytest.mark.parametrize("through", ["model", "model.model"])
def test_a_forward_between_a_gate_and_its_experts(through: str) -> None:
    model = tiny_olmoe(layers=2)
    entered = [False]

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        if not entered[0]:
            entered[0] = True
            (model if through == "model" else model.model)(**token_batch(1, 5, seed=9))
            entered[0] = False
        return self.experts(tokens, index, weights)

    with_block(model, block)
    with torch.no_grad(), received(model) as calls, moe_trace.MoETracer(model) as tracer:
        for seed in range(4):
            (model if through == "model" else model.model)(**token_batch(2, 3, seed=seed))
    found = by_layer(tracer)
    assert {n: sorted(c) for n, c in found.items()} == {n: sorted(c) for n, c in calls.items()}
    assert len(calls[0]) == 4 * 3
    assert not tracer.recording().lost.calls and tracer.recording().lost.experts_without_router == 0
    assert {s.step for s in tracer.samples()} == {0, 1, 2, 3}  # one step each, whatever is called inside


@pytest.mark.parametrize("caught", ["outside", "in the block"])
def test_experts_that_a_hook_keeps_from_running_received_nothing(caught: str) -> None:
    model = tiny_olmoe(layers=2)
    calls_of_hook = [0]

    def refuse(module: nn.Module, args: Any) -> None:
        calls_of_hook[0] += 1
        if calls_of_hook[0] % 3 == 0:
            raise ValueError("the user's")

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        try:
            return self.experts(tokens, index, weights)
        except ValueError:
            if caught == "outside":
                raise
            return tokens

    with_block(model, block)
    with torch.no_grad(), received(model) as calls, moe_trace.MoETracer(model) as tracer:
        model.model.layers[1].mlp.experts.register_forward_pre_hook(refuse)
        for seed in range(9):
            try:
                model(**token_batch(2, 3, seed=seed))
            except ValueError:
                assert caught == "outside"
    assert (len(calls[0]), len(calls[1])) == (9, 6)
    assert by_layer(tracer) == calls
    assert tracer.recording().lost.calls == {"model.layers.1.mlp.gate": {"interrupted": 3}}
    check(tracer, calls, all_of_them=False)


@pytest.mark.parametrize("way", ["eager", "profiled", "compiled", "training"])
def test_layers_that_share_a_router(way: str, tmp_path: Path) -> None:
    """Each call is that of the layer whose block runs; a call outside them assigns nothing."""
    model = tiny_olmoe(layers=3)
    shared = model.model.layers[0].mlp.gate
    for layer in model.model.layers[1:]:
        layer.mlp.gate = shared
    with received(model) as calls:
        if way == "compiled":
            run(model, 3)
            torch._dynamo.reset()
        with moe_trace.profile(model) if way == "profiled" else moe_trace.MoETracer(model) as traced:
            if way == "training":
                model.train().gradient_checkpointing_enable()
                for seed in range(3):
                    model(**token_batch(2, 3, seed=seed)).logits.sum().backward()
            elif way == "compiled":
                model.compile(backend="eager")
                run(model, 3)
            else:
                run(model, 3)
                no_grad(shared, torch.randn(4, model.config.hidden_size))
    tracer = traced.tracer if way == "profiled" else traced
    assert [site.name for site in tracer.sites] == [f"model.layers.{n}.mlp.gate" for n in range(3)]
    found = by_layer(tracer)
    assert {n: sorted(c) for n, c in found.items()} == {n: sorted(c) for n, c in calls.items()}
    assert not tracer.recording().lost.calls and tracer.recording().lost.experts_without_router == 0
    if way == "profiled":
        traced.export_chrome_trace(str(tmp_path / "trace.json"))
        lost = moe_trace.read_summary(tmp_path / "trace.json").lost
        assert lost.samples_without_range == lost.ranges_without_sample == 0


class ListedBlock(nn.Module):
    """A linear gate beside a list of experts, which run on a pool where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(EXPERTS))
        self.pool: Any = None
        self.fails_at = EXPERTS

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weights, index = torch.topk(self.gate(tokens).softmax(-1), 2, dim=-1)
        out, waiting = torch.zeros_like(tokens), []
        for number in range(EXPERTS):
            rows, slot = (index == number).nonzero(as_tuple=True)
            if number == self.fails_at:
                raise ValueError("the user's")
            if len(rows):
                call = (no_grad, self.experts[number], tokens[rows])
                one = call[0](*call[1:]) if self.pool is None else self.pool.submit(*call)
                waiting.append((rows, weights[rows, slot, None], one))
        for rows, weight, one in waiting:
            out.index_add_(0, rows, weight * (one if self.pool is None else one.result()))
        self.received = torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
        return out


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ListedBlock() for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


def test_listed_experts_on_other_threads() -> None:
    torch.manual_seed(0)
    model, calls = Listed(), Received()
    with torch.no_grad(), ThreadPoolExecutor(2) as pool, moe_trace.MoETracer(model) as tracer:
        for layer in model.layers:
            layer.pool = pool
        for _ in range(6):
            model(torch.randn(7, 16))
            for number, layer in enumerate(model.layers):
                calls.setdefault(number, []).append(layer.received)
    check(tracer, calls)


@pytest.mark.parametrize("fails_at", [0, 3, 7])
def test_listed_experts_of_which_some_were_called(fails_at: int) -> None:
    torch.manual_seed(0)
    model, calls = Listed(), Received()
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for step in range(6):
            model.layers[1].fails_at = fails_at if step % 2 else EXPERTS
            try:
                model(torch.randn(7, 16))
            except ValueError:
                assert step % 2
            else:
                calls.setdefault(1, []).append(model.layers[1].received)
            calls.setdefault(0, []).append(model.layers[0].received)
    assert by_layer(tracer) == calls
    assert tracer.recording().lost.calls == {"layers.1.gate": {"interrupted": 3}}


def test_a_block_that_is_fused_after_its_experts_were_called_is_traced_by_another_tracer() -> None:
    """The router's own word is not taken for a decision where experts are modules that are called."""
    model = tiny_olmoe(layers=2)

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        return self.experts.forward(tokens, index, weights)

    with received(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model, 3)
        with_block(model, block)
        run(model, 5)
    assert by_layer(tracer) == {layer: counts[:3] for layer, counts in calls.items()}
    check(tracer, calls, all_of_them=False)
    assert all(lost == {"unjoined": 5} for lost in tracer.recording().lost.calls.values())
    assert "a MoETracer of its own" in " ".join(tracer.summary().notes)
    with received(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model, 5)
    check(tracer, calls)


def test_models_that_mix_fused_blocks_with_experts_that_are_called() -> None:
    """Block by block all is recorded; call by call it is not known what a fused one did, but counted."""
    model, calls_of_block = tiny_olmoe(layers=3), Counter[int]()

    def fused(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(tokens)
        return self.experts.forward(tokens, index, weights)

    def alternating(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        calls_of_block[id(self)] += 1
        _, weights, index = self.gate(tokens)
        experts = self.experts if calls_of_block[id(self)] % 2 or called else self.experts.forward
        return experts(tokens, index, weights)

    called = False
    first, second, _ = (layer.mlp for layer in model.model.layers)
    for block, forward in ((first, fused), (second, alternating)):
        block.forward = types.MethodType(
            lambda self, hidden, forward=forward: forward(self, hidden.flatten(0, 1)).view_as(hidden), block
        )
    with received(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model)
    assert by_layer(tracer) == {0: calls[0], 1: calls[1][::2], 2: calls[2]}
    assert tracer.recording().lost.calls == {"model.layers.1.mlp.gate": {"unjoined": 3}}
    assert "call them as a module everywhere" in " ".join(tracer.summary().notes)
    called = True
    with received(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model)
    check(tracer, calls)


def test_experts_called_before_the_router_of_their_block_are_not_its_own() -> None:
    """Each forward's experts run, steered, when the next one's block begins, on the same thread."""
    model = tiny_olmoe(layers=1)
    late: list[Any] = []

    def block(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        if late:
            late.pop(0)()
        _, weights, index = self.gate(tokens)
        late.append(lambda: self.experts(tokens, (index + 3) % EXPERTS, weights.clone()))
        return tokens

    with received(model) as calls, moe_trace.MoETracer(model) as tracer:
        run(model, 3)
        with_block(model, block)
        run(model, 6)
    lost = tracer.recording().lost
    assert by_layer(tracer)[0] == calls[0][:3]
    assert lost.experts_without_router == 5
    assert lost.calls == {"model.layers.0.mlp.gate": {"unjoined": 6}}
