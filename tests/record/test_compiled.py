"""Tests inside torch.compile: the assignments of eager mode, call by call, and no additional graphs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import torch._inductor.metrics as inductor_metrics
from torch._dynamo.testing import CompileCounterWithBackend

import moe_trace
from compiled_models import WAYS, compile_layers, compiled_anew, run, small_model
from models import counted, tiny_olmoe, token_batch, watch_compiled_experts, watch_experts

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SHAPES = [(1, 1), (1, 1), (2, 12), (3, 40), (1, 1)]  # raw in two sizes, and reduced in the graph
EXPERTS = 8


@pytest.fixture(scope="module", autouse=True)
def warm_inductor() -> None:
    """Inductor keeps a thread for the whole process from its first compilation on."""
    torch.compile(lambda x: x.sin().sum(), mode="max-autotune-no-cudagraphs")(torch.ones(64))


def eager_assignments(shapes: list[tuple[int, int]], layers: int = 2) -> list[list[list[int]]]:
    """[call][layer][expert], as the experts of an eager run received them."""
    model, found = small_model(layers), []
    for i, (batch, length) in enumerate(shapes):
        with torch.no_grad(), watch_experts(model) as calls:
            model(**token_batch(batch, length, seed=i), use_cache=False)
        found.append([call.assignments(EXPERTS) for call in calls])
    return found


def recorded(tracer: moe_trace.MoETracer) -> list[list[list[int]]]:
    """[call][layer][expert] from the samples, in the order of their calls."""
    samples = sorted(tracer.samples(), key=lambda s: (s.call, s.layer))
    layers = len(tracer.sites)
    counts = [s.assignments.tolist() for s in samples]
    return [counts[i : i + layers] for i in range(0, len(counts), layers)]


@pytest.mark.parametrize("way", WAYS)
def test_assignments_equal_eager_call_by_call(way: str) -> None:
    model = small_model()
    # One graph for all shapes costs three times as much: test_routes_compiled.py has it of the inner model.
    dynamic = False if way == "model.model" else None
    with moe_trace.MoETracer(model) as tracer:
        run(WAYS[way](model, backend="aot_eager", fullgraph=True, dynamic=dynamic), SHAPES)
    assert recorded(tracer) == eager_assignments(SHAPES)
    samples = tracer.samples()
    assert all(s.in_graph for s in samples)
    assert [s.tokens for s in samples if s.layer == 0] == [b * t for b, t in SHAPES]
    assert [s.step for s in samples if s.layer == 0] == list(range(len(SHAPES)))
    assert tracer.recording().lost.never_called == ()


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_inductor_writes_the_same(mode: str) -> None:
    """Layers of one code, so that one compilation serves all; both ways of writing a row."""
    shapes = [(1, 2), (3, 40), (1, 2)]
    model = small_model()
    with moe_trace.MoETracer(model) as tracer:
        run(compile_layers(model, mode=mode, fullgraph=True), shapes)
    assert recorded(tracer) == eager_assignments(shapes)


def test_inductor_writes_the_same_for_a_whole_model() -> None:
    shapes = [(1, 2), (1, 2)]
    model = small_model()
    with moe_trace.MoETracer(model) as tracer:
        run(torch.compile(model, fullgraph=True), shapes)
    assert recorded(tracer) == eager_assignments(shapes)


class BreaksTheGraph(torch.nn.Module):
    """A module whose call the compiler cannot take into one graph with what stands before it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> Any:
        torch._dynamo.graph_break()
        return self.inner(hidden)


def test_a_forward_of_several_graphs_loses_nothing() -> None:
    shapes = [(1, 1), (3, 40), (1, 1)]
    model = small_model()
    model.model.norm = BreaksTheGraph(model.model.norm)  # after the last router: the forward ends elsewhere
    layer = model.model.layers[1]
    layer.post_attention_layernorm = BreaksTheGraph(layer.post_attention_layernorm)
    with moe_trace.MoETracer(model) as tracer:
        run(torch.compile(model, backend="aot_eager", dynamic=False), shapes)
    assert recorded(tracer) == eager_assignments(shapes)
    assert all(s.in_graph for s in tracer.samples())


def test_the_writes_of_all_routers_are_one_kernel() -> None:
    """Each kernel costs a replayed decode step more than what it does, so their number is the cost."""
    olmoe = tiny_olmoe(layers=3)
    olmoe.set_experts_implementation("grouped_mm")
    model = torch.nn.Sequential(*(layer.mlp for layer in olmoe.model.layers)).eval()
    hidden = torch.randn(1, 1, olmoe.config.hidden_size)

    def kernels() -> int:
        dynamo.reset()
        inductor_metrics.reset()
        with compiled_anew(), torch.no_grad():
            torch.compile(model, fullgraph=True)(hidden)
        return inductor_metrics.generated_kernel_count

    bare = kernels()
    with moe_trace.MoETracer(model) as tracer:
        assert kernels() == bare + 2  # the rows, and the count of forwards; 3 where routers write at once
    assert [s.tokens for s in tracer.samples()] == [1] * 3


def test_half_precision_is_recorded_as_the_same_code_decided() -> None:
    """Inductor rounds otherwise than eager code, so what its own experts receive is the truth."""
    model = small_model().to(torch.bfloat16)
    expected = []
    with watch_compiled_experts(model, 256) as buffers, moe_trace.MoETracer(model) as tracer:
        forward = compile_layers(model, fullgraph=True)
        for seed in range(4):
            run(forward, [(2, 128)], seed)
            expected.append(counted(buffers, EXPERTS))
    assert all(sum(layer) == 256 * 2 for call in expected for layer in call)
    assert recorded(tracer) == expected


def test_figures_from_a_graph_equal_those_of_the_eager_run() -> None:
    figures = ("router_entropy", "confidence", "top1_prob", "topk_mass", "z_loss", "aux_loss")
    eager, compiled = small_model(), small_model()
    with moe_trace.MoETracer(eager) as expected:
        run(eager, SHAPES)
    with moe_trace.MoETracer(compiled) as tracer:
        run(compile_layers(compiled, backend="aot_eager"), SHAPES)
    for ours, theirs in zip(tracer.samples(), expected.samples(), strict=True):
        assert (ours.site, ours.call, ours.stage) == (theirs.site, theirs.call, theirs.stage)
        assert ours.k_histogram.tolist() == theirs.k_histogram.tolist()
        assert (ours.skipped, ours.nonfinite_tokens) == (0, 0)
        assert ours.expert_flops == theirs.expert_flops
        for name in figures:
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5), name


def test_dynamic_shapes_compile_once_more_for_each_way_of_writing() -> None:
    shapes = [(2, 5), (3, 7), (2, 30), (4, 40), (3, 41), (2, 8)]

    def compilations(model: Any) -> int:
        dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        run(torch.compile(model, backend=counter, dynamic=True, fullgraph=True), shapes)
        return counter.frame_count

    bare, model = compilations(small_model(1)), small_model(1)
    with moe_trace.MoETracer(model) as tracer:
        assert compilations(model) == 2 * bare  # up to 64 tokens, and more
    assert recorded(tracer) == eager_assignments(shapes, layers=1)


def graphs_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    with torch.no_grad():
        found = dynamo.explain(model)(**batch, use_cache=False)
    return found.graph_count, found.graph_break_count


def test_the_tracer_adds_no_graph() -> None:
    batch = token_batch(2, 12)
    bare = graphs_of(small_model(), batch)
    dynamo.reset()
    model = small_model()
    with moe_trace.MoETracer(model) as tracer:
        assert graphs_of(model, batch) == bare == (1, 0)
    assert len(tracer.samples()) == 2


@pytest.mark.parametrize("way", ["model", "layers"])
def test_steps_profilers_and_sampling_recompile_nothing(way: str) -> None:
    model = small_model()
    counter = CompileCounterWithBackend("aot_eager")
    with moe_trace.MoETracer(model, every=2) as tracer:
        forward = WAYS[way](model, backend=counter)
        run(forward, [(2, 12)])
        tracer.step()
        compiled = counter.frame_count
        for _ in range(3):
            run(forward, [(2, 12)])
            tracer.step()
        with torch.profiler.profile() as prof:
            run(forward, [(2, 12)])
        assert prof.events()
        tracer.step()
        run(forward, [(2, 12)])
    assert counter.frame_count == compiled == 1
    samples = [s for s in tracer.samples() if s.layer == 0]
    assert [(s.step, s.call) for s in samples] == [(0, 0), (2, 1), (4, 2)]


def test_layers_share_their_compiled_code_as_without_the_tracer() -> None:
    def compilations(model: Any) -> int:
        dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        run(compile_layers(model, backend=counter), [(2, 12), (2, 12)])
        return counter.frame_count

    bare, model = compilations(small_model()), small_model()
    with moe_trace.MoETracer(model) as tracer:
        assert compilations(model) == bare
    assert recorded(tracer) == eager_assignments([(2, 12), (2, 12)])


def test_a_tracer_that_comes_too_late_says_so_and_can_recompile() -> None:
    model = small_model()
    forward = torch.compile(model, backend="aot_eager")
    run(forward, [(1, 3)])
    with pytest.warns(RuntimeWarning, match=r"compiled before the tracer was on.*tracer\.recompile\(\)"):
        with moe_trace.MoETracer(model) as late:
            run(forward, [(1, 3)])
    assert late.samples() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with moe_trace.MoETracer(model) as tracer:
            tracer.recompile()
            run(forward, [(1, 3)])
    assert recorded(tracer) == eager_assignments([(1, 3)])


def test_what_runs_while_the_tracer_is_off_is_not_recorded() -> None:
    model = small_model()
    tracer = moe_trace.MoETracer(model)
    with tracer:
        forward = torch.compile(model, backend="aot_eager")
        run(forward, [(1, 3)])
    run(forward, [(1, 3)])  # with muted hooks
    with tracer:
        tracer.recompile()
        run(forward, [(1, 3)])
    assert len(recorded(tracer)) == 2


def test_more_forwards_than_a_ring_has_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped in time where the host sees the forwards; counted as lost where nobody does."""
    monkeypatch.setattr("moe_trace.record.graphs.ring_buffer._BYTES", 10_000)
    shapes = [(1, 3)] * 60
    model = small_model()
    with moe_trace.MoETracer(model) as tracer:
        run(compile_layers(model, backend="aot_eager"), shapes)
    slots = tracer._graphs.rings.slots
    assert slots < 30
    assert len(recorded(tracer)) == 60
    assert tracer.recording().lost.overwritten == 0


def test_calls_keep_their_numbers_where_older_ones_were_dropped() -> None:
    model = small_model()
    with moe_trace.MoETracer(model, capacity=8) as tracer:
        run(compile_layers(model, backend="aot_eager"), [(1, 3)] * 10)
    samples = [s for s in tracer.samples() if s.layer == 0]
    assert {s.in_graph for s in samples} == {True}
    assert [s.call for s in samples] == [6, 7, 8, 9]


@pytest.mark.parametrize("steps", [False, True])
def test_forwards_inside_a_larger_graph_are_counted_by_the_device(
    monkeypatch: pytest.MonkeyPatch, steps: bool
) -> None:
    """The host sees no call of the model: only marks, which `step` makes, tell it how far the device is."""
    monkeypatch.setattr("moe_trace.record.graphs.ring_buffer._BYTES", 10_000)
    model = small_model()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(**batch: Any) -> Any:
        return model(**batch).logits

    with moe_trace.MoETracer(model) as tracer:
        for _ in range(60):
            run(function, [(1, 3)])
            if steps:
                tracer.step()
        slots = tracer._graphs.rings.slots
    assert 4 < slots < 30
    expected = 60 if steps else slots
    assert recorded(tracer) == eager_assignments([(1, 3)]) * expected
    assert tracer.recording().lost.overwritten == 2 * (60 - expected)
    steps_seen = [s.step for s in tracer.samples() if s.layer == 0]
    assert steps_seen == list(range(60 - expected, 60))
    assert {s.host_start_ns for s in tracer.samples()} == {0}


def test_generate_with_a_static_cache_and_its_own_compilation() -> None:
    from transformers import CompileConfig

    def generate(model: Any, compiled: bool) -> None:
        config = CompileConfig(backend="aot_eager", fullgraph=True)
        config._compile_all_devices = True
        options = {"compile_config": config} if compiled else {"disable_compile": True}
        model.generate(
            **token_batch(2, 7),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            cache_implementation="static",
            **options,
        )

    reference, expected = small_model(), []
    with watch_experts(reference) as calls:
        generate(reference, compiled=False)
    expected = [[c.assignments(EXPERTS) for c in calls[i : i + 2]] for i in range(0, len(calls), 2)]
    model = small_model()
    with moe_trace.MoETracer(model) as tracer:
        generate(model, compiled=True)
        generate(model, compiled=True)
    assert recorded(tracer) == 2 * expected
    samples = [s for s in tracer.samples() if s.layer == 0]
    assert [s.stage for s in samples] == 2 * (["prefill"] + ["decode"] * 5)
    assert [s.in_graph for s in samples] == 2 * ([False] + [True] * 5)
    assert [s.call for s in samples] == list(range(12))


@pytest.mark.parametrize("way", ["model", "layers"])
def test_warmup_leaves_the_hooks_in_code_compiled_during_it(way: str) -> None:
    dynamo.reset()
    batches = [token_batch(2, 12, seed=seed) for seed in range(4)]
    expected = [[c.assignments(EXPERTS) for c in _watched(small_model(), batch)] for batch in batches]
    model = small_model()
    with torch.no_grad(), moe_trace.MoETracer(model, warmup=1, every=2) as tracer:
        run = WAYS[way](model, backend="aot_eager")
        for batch in batches:
            run(**batch)
    assert recorded(tracer) == expected[1::2]
    assert [s.step for s in tracer.samples() if s.layer == 0] == [1, 3]


@pytest.mark.parametrize("way", ["model", "layers"])
def test_loss_and_gradients_are_equal_with_and_without(way: str) -> None:
    def train(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        dynamo.reset()
        model.train()
        batch = token_batch(2, 12)
        loss = WAYS[way](model, backend="aot_eager")(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    bare_loss, bare = train(small_model())
    model = small_model()
    with moe_trace.MoETracer(model) as tracer:
        loss, gradients = train(model)
    assert torch.equal(loss, bare_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, bare, strict=True))
    assert {s.stage for s in tracer.samples()} == {"train"}
    assert recorded(tracer) == [
        [c.assignments(EXPERTS) for c in calls] for calls in [_watched(small_model(), token_batch(2, 12))]
    ]


def _watched(model: Any, batch: dict[str, torch.Tensor]) -> list[Any]:
    with torch.no_grad(), watch_experts(model) as calls:
        model(**batch)
    return calls


@torch.no_grad()
def test_forwards_of_code_without_hooks_are_counted_and_told() -> None:
    """Dynamo does not ask whether hooks came after it had compiled: that code would run on in silence."""
    model, batch = small_model(), token_batch(2, 12)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch)
    with moe_trace.MoETracer(model) as tracer:
        model(**batch)
        compiled(**batch)
        compiled(**batch)
    with pytest.warns(RuntimeWarning, match=r"no router call was seen in 2 forwards.*recompile"):
        lost = tracer.recording().lost
    assert lost.silent_forwards == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert any("in 2 forwards no router call was seen" in note for note in tracer.summary().notes)
    with moe_trace.MoETracer(model) as whole:
        whole.recompile()
        model(**batch)
        compiled(**batch)
    assert whole.recording().lost.silent_forwards == 0
