"""Tests of what users do to a recorded model: counts are what experts received, or a loss says why."""

from __future__ import annotations

import copy
import itertools
import threading
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DogeConfig, DogeForCausalLM

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.find.registry import unregister_adapter

EXPERTS = 8


def assert_conserved(tracer: moe_trace.MoETracer) -> None:
    """Router calls seen are recorded, or lost for a reason."""
    lost, recorded = tracer.recording().lost, tracer.calls_by_router()
    samples = tracer.samples()
    for site in tracer.sites:
        reasons = dict(lost.calls.get(site.name, {}))
        kept = sum(s.name == site.name for s in samples)
        gone = sum(reasons.get(reason, 0) for reason in ("overwritten", "rewritten", "unreduced"))
        assert kept == recorded[site.name] - gone
        assert lost.calls_seen.get(site.name, 0) == kept + sum(reasons.values())


def counts_of(samples: list[Any]) -> list[list[int]]:
    return [s.assignments.tolist() for s in samples]


def test_a_choice_forced_by_a_later_hook_is_what_is_recorded() -> None:
    model = tiny_olmoe()

    def force(module: Any, args: Any) -> Any:
        return args[0], torch.zeros_like(args[1]) + torch.arange(2), *args[2:]

    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**token_batch())
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(force)
        model(**token_batch())
    for sample in tracer.samples()[3:]:
        assert sample.assignments.tolist() == [24, 24, 0, 0, 0, 0, 0, 0]
    assert_conserved(tracer)


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_choice_that_later_hooks_write_into_is_what_is_recorded(mode: Any, profiled: bool) -> None:
    """From the first forward on, and in the middle of a run: ours are put on behind them."""
    model = tiny_olmoe(layers=2)

    def steer(module: Any, args: Any) -> None:
        args[1].add_(1).remainder_(EXPERTS)

    calls: list[list[int]] = []
    inner = type(model.model.layers[0].mlp.experts).forward

    def forward(self: Any, hidden: Any, index: Any, weights: Any) -> Any:
        calls.append(torch.bincount(index.flatten(), minlength=EXPERTS).tolist())
        return inner(self, hidden, index, weights)

    for layer in model.model.layers:
        layer.mlp.experts.forward = types.MethodType(forward, layer.mlp.experts)
    with mode(), moe_trace.profile(model) if profiled else moe_trace.MoETracer(model) as traced:
        for _ in range(2):
            for layer in model.model.layers:
                layer.mlp.experts.register_forward_pre_hook(steer)
            run_some(model, 8)
    tracer = traced.tracer if profiled else traced
    assert counts_of(tracer.samples()) == calls
    assert_conserved(tracer)


def test_a_later_hook_on_a_router_is_seen() -> None:
    """Its output as the block gets it: logits too."""
    model = tiny_olmoe(layers=1)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**token_batch())
        model.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, out: (out[0] * 0, *out[1:]))
        model(**token_batch())
    entropy = [s.router_entropy for s in tracer.samples()]
    assert entropy[1] == pytest.approx(np.log(EXPERTS)) != pytest.approx(entropy[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_hooks_of_others_let_be_written_is_found_out_again(mode: Any) -> None:
    """After they came or went, the choice is written over behind our hooks, in the first forward already."""
    model = tiny_olmoe(layers=1)
    block = model.model.layers[0].mlp
    with mode(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        for _ in range(8):
            model(**token_batch())
        handle = block.gate.register_forward_hook(lambda m, a, out: (out[0], out[1], out[2].flip(0)))
        model(**token_batch())
        handle.remove()
        block.experts.register_forward_hook(lambda m, args, out: (args[1].zero_(), None)[1])
        for _ in range(8):
            model(**token_batch())
    assert counts_of(tracer.samples()) == [c.assignments(EXPERTS) for c in calls]
    assert_conserved(tracer)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_hook_that_takes_the_place_of_another_is_another(mode: Any) -> None:
    """As many hooks as before: only which they are tells that what the experts are given is written over."""
    model = tiny_olmoe(layers=1)
    experts = model.model.layers[0].mlp.experts
    with mode(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        handle = experts.register_forward_hook(lambda m, args, out: None)
        for _ in range(8):
            model(**token_batch())
        handle.remove()
        experts.register_forward_hook(lambda m, args, out: (args[1].zero_(), None)[1])
        for _ in range(8):
            model(**token_batch())
    assert counts_of(tracer.samples()) == [c.assignments(EXPERTS) for c in calls]
    assert_conserved(tracer)


def test_a_routers_hook_that_takes_the_place_of_another_is_seen() -> None:
    model = tiny_olmoe(layers=1)
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        handle = gate.register_forward_hook(lambda m, args, out: None)
        for _ in range(8):
            model(**token_batch())
        handle.remove()
        gate.register_forward_hook(lambda m, args, out: (torch.zeros_like(out[0]), *out[1:]))
        model(**token_batch())
    assert tracer.samples()[-1].router_entropy == pytest.approx(np.log(EXPERTS))


def test_logits_that_are_no_numbers_are_not_taken_for_written_over() -> None:
    """NaN differs from itself: in inference mode, where values are compared, it would be copied for ever."""
    model = tiny_olmoe(layers=1)
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda m, args, out: (out[0] * float("nan"), *out[1:]))
    with torch.inference_mode(), moe_trace.MoETracer(model) as tracer:
        for _ in range(12):
            model(**token_batch())
        assert tracer._hooks.routers[0].copies is None
    assert len(tracer.samples()) == 12


def test_a_fake_gpu_is_not_asked_whether_it_captures() -> None:
    """Nothing has used a real one, and a torch without CUDA has nobody to ask."""
    block = tiny_olmoe(layers=1).model.layers[0].mlp
    block.experts.forward = types.MethodType(lambda self, hidden, index, weights: hidden * 2, block.experts)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in block.modules():
            for name, one in list(module.named_parameters(recurse=False)):
                fake = torch.empty(one.shape, device="cuda")
                setattr(module, name, nn.Parameter(fake, requires_grad=False))
        with moe_trace.MoETracer(block), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(12):
                block(torch.empty(1, 4, 32, device="cuda"))


def zeroed_by_the_block(model: Any) -> None:
    """When its experts are done."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.flatten(0, 1)
        _, w, i = self.gate(x)
        out = self.experts(x, i, w)
        i.zero_()
        return out.view_as(hidden)

    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(forward, layer.mlp)


def zeroed_by_a_hook(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda m, args, out: (args[1].zero_(), None)[1])


def reused_by_all_blocks(model: Any) -> None:
    """They copy the choice into one buffer, which the experts are given."""
    buffer = torch.zeros(24, 2, dtype=torch.int64)

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.flatten(0, 1)
        _, w, i = self.gate(x)
        return self.experts(x, buffer[: len(i)].copy_(i), w).view_as(hidden)

    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(forward, layer.mlp)


def in_many_buffers(model: Any) -> None:
    """Taken in turn, more than calls are learned from."""
    for layer in model.model.layers:
        buffers = itertools.cycle([torch.zeros(24, 2, dtype=torch.int64) for _ in range(7)])

        def keep(m: Any, args: Any, out: Any, buffers: Any = buffers) -> Any:
            return out[0], out[1], next(buffers)[: len(out[2])].copy_(out[2])

        layer.mlp.gate.register_forward_hook(keep)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "use", [zeroed_by_the_block, zeroed_by_a_hook, reused_by_all_blocks, in_many_buffers]
)
def test_a_choice_that_does_not_last(use: Any, mode: Any, later: bool) -> None:
    """It is copied, or lost until that is known; in inference mode no tensor tells that it was written."""
    if later and mode is torch.inference_mode and use is zeroed_by_the_block:
        pytest.skip("nothing tells that")
    model = tiny_olmoe(layers=2)
    with mode(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        if later:
            run_some(model, 8)
        use(model)
        run_some(model, 40)
    received = [(c.layer, c.assignments(EXPERTS)) for c in calls]
    found = [(s.layer, s.assignments.tolist()) for s in tracer.samples()]
    lost = sum(map(Counter, tracer.recording().lost.calls.values()), Counter[str]())
    assert not Counter(map(str, found)) - Counter(map(str, received))
    assert set(lost) <= {"rewritten"} and len(found) + lost["rewritten"] == len(received)
    if use is zeroed_by_a_hook or not (later or use is in_many_buffers):
        assert found == received
    assert_conserved(tracer)


def test_a_hook_that_writes_into_a_choice_comes_while_no_step_is_recorded() -> None:
    """Ours are put on behind it."""
    model = tiny_olmoe(layers=1)
    with torch.inference_mode(), watch_experts(model) as calls, moe_trace.MoETracer(model, every=2) as tracer:
        run_some(model, 16)
        zeroed_by_a_hook(model)
        run_some(model, 16)
    assert counts_of(tracer.samples()) == [c.assignments(EXPERTS) for c in calls][::2]
    assert_conserved(tracer)


def run_some(model: Any, count: int) -> None:
    for seed in range(count):
        model(**token_batch(seed=seed))


def test_a_choice_that_is_written_over_while_a_thread_is_inside_is_lost_once_and_then_copied() -> None:
    """Its forward has not ended, so that all others are joined one by one."""
    model = tiny_olmoe(layers=1)
    experts, inside, go_on = model.model.layers[0].mlp.experts, threading.Event(), threading.Event()

    def wait(module: Any, args: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait()

    def run() -> None:
        with torch.no_grad():
            model(**token_batch())

    thread = threading.Thread(target=run)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        experts.register_forward_pre_hook(wait)
        thread.start()
        inside.wait()
        for _ in range(8):
            model(**token_batch())
        zeroed_by_the_block(model)
        for _ in range(4):
            model(**token_batch())
        go_on.set()
        thread.join()
    lost = tracer.recording().lost.calls["model.layers.0.mlp.gate"]
    assert set(lost) == {"rewritten"}
    received = [c.assignments(EXPERTS) for c in calls]
    assert all(counts in received for counts in counts_of(tracer.samples()))
    assert_conserved(tracer)


@pytest.mark.parametrize("profiled", [False, True])
def test_a_gate_called_without_its_experts_assigns_nothing(profiled: bool) -> None:
    """Prefetching the experts of the next layer."""
    model = tiny_olmoe()
    layers = model.model.layers
    for one, after in itertools.pairwise(layers):
        gate = after.mlp.gate
        one.mlp.register_forward_pre_hook(lambda m, args, gate=gate: (gate(args[0].flatten(0, 1)), None)[1])
    context = moe_trace.profile(model) if profiled else moe_trace.MoETracer(model)
    with torch.no_grad(), watch_experts(model) as calls, context as running:
        for _ in range(6):
            model(**token_batch())
    tracer = running.tracer if profiled else running
    assert counts_of(tracer.samples()) == [c.assignments(EXPERTS) for c in calls]
    assert tracer.recording().lost.calls["model.layers.1.mlp.gate"] == {"without_experts": 6}
    assert_conserved(tracer)


def hot_and_cold(block: Any, x: Any, w: Any, i: Any) -> Any:
    hot = i < 4
    return block.experts(x, i, w * hot) + block.experts(x, i, w * ~hot)


def tiles(block: Any, x: Any, w: Any, i: Any) -> Any:
    parts = zip(x.split(7), i.split(7), w.split(7), strict=True)
    return torch.cat([block.experts(a, b, c) for a, b, c in parts])


def slots(block: Any, x: Any, w: Any, i: Any) -> Any:
    return block.experts(x, i[:, :1], w[:, :1]) + block.experts(x, i[:, 1:], w[:, 1:])


def named(block: Any, x: Any, w: Any, i: Any) -> Any:
    return block.experts(top_k_weights=w, hidden_states=x, top_k_index=i)


def on_a_thread(block: Any, x: Any, w: Any, i: Any) -> Any:
    found: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            found.append(block.experts(x, i, w))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def slots_on_threads(block: Any, x: Any, w: Any, i: Any) -> Any:
    found: dict[int, Any] = {}

    def work(slot: int) -> None:
        with torch.no_grad():
            found[slot] = block.experts(x, i[:, slot, None], w[:, slot, None])

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0] + found[1]


@pytest.mark.parametrize("way", [hot_and_cold, tiles, slots, named, on_a_thread, slots_on_threads])
def test_experts_called_in_other_ways_make_one_decision(way: Any) -> None:
    model, true = tiny_olmoe(layers=2), []

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.flatten(0, 1)
        _, w, i = self.gate(x)
        true.append(torch.bincount(i.flatten(), minlength=EXPERTS).tolist())
        return way(self, x, w, i).view_as(hidden)

    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(forward, layer.mlp)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for seed in range(6):
            model(**token_batch(seed=seed))
    assert counts_of(tracer.samples()) == true
    assert_conserved(tracer)


class StaticRouter(nn.Module):
    """Writes its decision into the same buffers in every call."""

    def __init__(self, buffers: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = EXPERTS, 2
        self.gate = nn.Linear(16, EXPERTS, bias=False)
        self.kept = [(torch.zeros(32, 2), torch.zeros(32, 2, dtype=torch.int64)) for _ in range(buffers)]
        self.true: list[list[int]] = []

    def forward(self, x: torch.Tensor) -> Any:
        out = self.kept[len(self.true) % len(self.kept)]
        torch.topk(torch.sigmoid(self.gate(x)), self.top_k, out=out)
        self.true.append(torch.bincount(out[1].flatten(), minlength=EXPERTS).tolist())
        return out


class StaticBlock(nn.Module):
    def __init__(self, buffers: int) -> None:
        super().__init__()
        self.router = StaticRouter(buffers)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, _ = self.router(x)
        return x * weights.sum(-1, keepdim=True)


@pytest.fixture
def contract() -> Iterator[None]:
    moe_trace.register_adapter(
        "static",
        router=StaticRouter,
        watch="gate",
        read=lambda call: moe_trace.RouterOutput(
            index_TK=call.router_output[1], weights_TK=call.router_output[0], logits_TE=call.watched_output
        ),
    )
    yield
    unregister_adapter("static")


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_buffers_that_are_written_again_are_copied(contract: None, buffers: int, inference: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(StaticBlock(buffers))
    with torch.inference_mode(inference), torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for _ in range(20):
            model(torch.randn(32, 16))
    assert counts_of(tracer.samples()) == model[0].router.true
    assert_conserved(tracer)


def test_a_contract_may_raise_anything(contract: None) -> None:
    model = nn.Sequential(StaticBlock(1))
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer, warnings.catch_warnings():
        warnings.simplefilter("error")  # not even our warning ends the forward
        tracer._hooks.routers[0].read = lambda call: [][0]  # type: ignore[return-value]
        model(torch.randn(32, 16))
    lost = tracer.recording().lost
    assert lost.misread == {"0.router": "IndexError: list index out of range"}
    assert lost.calls == {"0.router": {"unreadable": 1}}
    assert_conserved(tracer)


def test_one_bad_call_loses_no_other(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=2)
    model.set_experts_implementation("batched_mm")
    path, ids = tmp_path / "trace.json", token_batch()["input_ids"]
    with torch.no_grad(), moe_trace.profile(model) as prof, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(ids)
        model.to("meta")
        model(ids.to("meta"))
    prof.export_chrome_trace(str(path))
    summary = moe_trace.read_summary(path)
    assert summary.totals.calls == 2 and summary.lost.unreduced == 2
    assert_conserved(prof.tracer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(dtype: torch.dtype) -> None:
    model = tiny_olmoe(layers=1)
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
            model(**token_batch())
        assert counts_of(tracer.samples()) == [c.assignments(EXPERTS) for c in calls]
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_call_without_tokens_is_a_call() -> None:
    model = tiny_olmoe(layers=1)
    block = model.model.layers[0].mlp
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        block(torch.zeros(1, 0, 32))
        model(**token_batch())
    assert [s.tokens for s in tracer.samples()] == [0, 24]
    assert counts_of(tracer.samples()) == [c.assignments(EXPERTS) for c in calls]
    assert_conserved(tracer)


class Wrapper(nn.Module):
    """A user's own, whose arguments tell nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.policy = model

    def forward(self, batch: Any) -> Any:
        return self.policy(**batch)


ENTRIES = {
    "the model": lambda model: (model, model),
    "a wrapper's model": lambda model: (Wrapper(model), model),
    "what compile returned": lambda model: (torch.compile(model, backend="eager"), model),
}


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"warmup": 1}])
@pytest.mark.parametrize("entry", ENTRIES)
def test_generate_further_inside_is_the_same_run(entry: str, options: dict[str, int]) -> None:
    batch = token_batch(3, 10)
    batch["attention_mask"][0, :4] = 0

    def run(entry: str) -> Any:
        traced, called = ENTRIES[entry](tiny_olmoe(layers=2))
        with torch.no_grad(), moe_trace.MoETracer(traced, **options) as tracer:
            called.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        totals = tracer.summary().totals
        return [(s.stage, s.step) for s in tracer.samples()], totals.padding_assignments

    assert run(entry) == run("the model")


def test_an_inner_model_called_alone_and_nested_calls_count_once() -> None:
    model = tiny_olmoe(layers=2)
    wrapper, batch = Wrapper(model), token_batch(2, 6)
    batch["attention_mask"][0, :3] = 0
    with torch.no_grad(), moe_trace.MoETracer(wrapper) as tracer:
        wrapper(batch)
        model.model(**batch)
        model(**batch)
    assert tracer.forwards_seen == 3
    samples = tracer.samples()
    assert [s.step for s in samples] == [0, 0, 1, 1, 2, 2]
    assert {(s.stage, s.padding_assignments) for s in samples} == {("prefill", 3 * 2)}


def test_a_wrapper_that_generates_is_one_step_of_many_stages() -> None:
    class Agent(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> Any:
            return self.model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    agent = Agent(tiny_olmoe(layers=1))
    with torch.no_grad(), moe_trace.MoETracer(agent) as tracer:
        agent(token_batch(1, 5)["input_ids"])
    assert [(s.stage, s.step) for s in tracer.samples()] == [("prefill", 0), ("decode", 0), ("decode", 0)]
    assert tracer.forwards_seen == 1


def test_padding_of_tiles_is_said_to_be_unknown() -> None:
    class Tiled(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.mlp(part.contiguous()) for part in hidden.chunk(2, dim=1)], 1)

    batch = token_batch(3, 10)
    batch["attention_mask"][0, :4] = 0
    model = tiny_olmoe(layers=2)
    for layer in model.model.layers:
        layer.mlp = Tiled(layer.mlp)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**batch)
    assert tracer.recording().lost.padding_unknown == 1
    assert_conserved(tracer)


def test_blocks_that_are_replaced_are_missed_and_a_new_tracer_has_them() -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**token_batch())
        for layer in model.model.layers:
            layer.mlp = copy.deepcopy(layer.mlp)
        for _ in range(3):
            model(**token_batch())
    assert tracer.recording().lost.not_reached == {site.name: 3 for site in tracer.sites}
    assert any("new MoETracer" in note for note in tracer.summary().notes)
    with torch.no_grad(), moe_trace.MoETracer(model) as again:
        model(**token_batch())
    assert again.recording().lost.not_reached == {} and len(again.samples()) == 2


def test_generate_in_a_thread_stands_in_the_trace(tmp_path: Path) -> None:
    model, path = tiny_olmoe(layers=2), tmp_path / "trace.json"
    with moe_trace.profile(model) as prof:
        thread = threading.Thread(
            target=lambda: model.generate(
                **token_batch(1, 8), max_new_tokens=4, min_new_tokens=4, do_sample=False
            )
        )
        thread.start()
        thread.join()
    prof.export_chrome_trace(str(path))
    summary = moe_trace.read_summary(path)
    assert summary.totals.calls == len(prof.tracer.samples()) == 8
    assert summary.lost.samples_without_range == 0
    assert all(
        s.placement is not None and s.placement.host["router"].duration_us > 0 for s in prof.tracer.samples()
    )


def test_a_profile_inside_a_tracer_has_its_places(tmp_path: Path) -> None:
    model, path = tiny_olmoe(layers=2), tmp_path / "trace.json"
    with torch.no_grad(), moe_trace.MoETracer(model) as whole_run:
        model(**token_batch())
        with moe_trace.profile(model) as prof:
            model(**token_batch())
        model(**token_batch())
    prof.export_chrome_trace(str(path))
    summary = moe_trace.read_summary(path)
    assert summary.totals.calls == 2 and len(whole_run.samples()) == 6
    assert summary.lost.samples_without_range == summary.lost.ranges_without_sample == 0


def test_merging_a_trace_again_counts_its_losses_once(tmp_path: Path) -> None:
    model, path = tiny_olmoe(layers=1), tmp_path / "trace.json"
    with torch.no_grad(), torch.profiler.profile() as prof, moe_trace.MoETracer(model) as tracer:
        model(**token_batch())
    prof.export_chrome_trace(str(path))
    path.write_text(path.read_text().replace('"moe.router/L00"', '"gone"'))
    for _ in range(3):
        tracer.merge_into(path)
        assert tracer.recording().lost.samples_without_range == 1


def test_figures_are_bounded_in_bytes() -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), moe_trace.MoETracer(model, capacity_bytes=20_000) as tracer:
        for _ in range(40):
            model(**token_batch())
            tracer.samples()
    assert tracer._recorder._bytes <= 20_000
    assert 0 < len(tracer.samples()) < 80
    assert_conserved(tracer)


def test_counts_that_are_mostly_zero_take_little_memory() -> None:
    config = DogeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        is_moe=True,
        num_experts=4096,
        num_experts_per_tok=4,
        max_position_embeddings=128,
    )
    model = DogeForCausalLM(config).eval()
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        for seed in range(10):
            model(**{"input_ids": token_batch(1, 1, seed=seed)["input_ids"]})
        samples = tracer.samples()
    assert all(s.assignments.sum() == s.tokens * s.top_k - s.skipped for s in samples)
    assert tracer._recorder._bytes / len(samples) < 1000  # 32 KB as they are


def test_an_exported_program_has_nothing_of_ours() -> None:
    model = tiny_olmoe(layers=1).model.layers[0].mlp
    model.experts.config._experts_implementation = "grouped_mm"
    hidden = torch.randn(1, 4, 32)
    bare = torch.export.export(model, (hidden,))
    with moe_trace.MoETracer(nn.Sequential(model)) as tracer:
        traced = torch.export.export(model, (hidden,))
    assert [n.name for n in traced.graph.nodes] == [n.name for n in bare.graph.nodes]
    assert tracer.samples() == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_selective_checkpoint_saves_what_it_did(reentrant: bool) -> None:
    """Its policy counts the operators of a forward: ours must not be among them."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    seen: list[Any] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE

    def run(traced: bool) -> tuple[list[Any], list[torch.Tensor]]:
        seen.clear()
        model = tiny_olmoe(layers=1).train()
        model.set_experts_implementation("batched_mm")
        block, hidden = model.model.layers[0].mlp, torch.randn(1, 6, 32, generator=torch.manual_seed(0))
        options: dict[str, Any] = {"use_reentrant": reentrant}
        if not reentrant:
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
        tracer = moe_trace.MoETracer(model)
        if traced:
            tracer.start()
        checkpoint(block, hidden.requires_grad_(), **options).sum().backward()
        if traced:
            tracer.stop()
            assert {s.phase for s in tracer.samples()} == {"forward", "recompute"}
        return list(seen), [p.grad for p in block.parameters() if p.grad is not None]

    bare_ops, bare = run(False)
    ops, traced = run(True)
    assert ops == bare_ops
    assert all(torch.equal(a, b) for a, b in zip(bare, traced, strict=True))
