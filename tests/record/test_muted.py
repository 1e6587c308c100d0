"""Tests that a model is compiled once and traced many times: hooks in compiled code outlive their tracer."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo import config
from torch._dynamo.testing import CompileCounterWithBackend

import moe_trace
from compiled_models import WAYS, compiled_anew, run, small_model
from leak_watch import LeakWatch
from models import token_batch, watch_experts
from moe_trace.record import muted

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EXPERTS = 8
SHAPES = [(2, 12), (1, 3)]


def compile_blocks(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.compile(**options)
    return model


def compile_function(model: Any, **options: Any) -> Callable[..., Any]:
    return torch.compile(lambda **batch: model(**batch), **options)


ALL_WAYS = WAYS | {"blocks": compile_blocks, "function": compile_function}


def eager_counts(model: Any, shapes: list[tuple[int, int]], seed: int) -> list[list[int]]:
    """Of each layer's calls in turn, as the experts of an eager run received them."""
    found: list[list[list[int]]] = [[] for _ in model.model.layers]
    for i, (batch, length) in enumerate(shapes, start=seed):
        with torch.no_grad(), watch_experts(model) as calls:
            model(**token_batch(batch, length, seed=i), use_cache=False)
        for layer, call in enumerate(calls):
            found[layer].append(call.assignments(EXPERTS))
    return [counts for layer in found for counts in layer]


def recorded(tracer: moe_trace.MoETracer) -> list[list[int]]:
    samples = sorted(tracer.samples(), key=lambda s: (s.layer, s.call))
    return [s.assignments.tolist() for s in samples]


def hooks_on(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("way", ALL_WAYS)
def test_every_tracer_records_what_its_forwards_decided_and_nothing_is_compiled_again(way: str) -> None:
    model, plain = small_model(), small_model()
    counter, frames = CompileCounterWithBackend("eager"), []
    forward: Any = None
    tracers = []
    for number in range(3):
        with moe_trace.MoETracer(model) as tracer:
            forward = ALL_WAYS[way](model, backend=counter) if forward is None else forward
            run(forward, SHAPES, seed=10 * number)
            if way == "function":
                tracer.step()
        tracers.append(tracer)
        run(forward, SHAPES, seed=99)  # between two tracers: recorded by none
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2] > 0
    for number, tracer in enumerate(tracers):
        assert recorded(tracer) == eager_counts(plain, SHAPES, 10 * number), number
        assert tracer.recording().lost.overwritten == tracer.recording().lost.silent_forwards == 0
        if way != "function":
            assert [s.step for s in tracer.samples() if s.layer == 0] == [0, 1]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@compiled_anew()  # what is not compiled has no notes
def test_inductors_code_is_used_again_with_equal_outputs(mode: str) -> None:
    model, plain = small_model(), small_model()
    batch = token_batch(2, 12)
    with torch.no_grad():
        expected = plain(**batch, use_cache=False).logits
    compiled: Any = None
    counters = dynamo.utils.counters["stats"]
    graphs = set()
    for _ in range(3):
        with moe_trace.MoETracer(model) as tracer, torch.no_grad():
            compiled = torch.compile(model, mode=mode) if compiled is None else compiled
            got = compiled(**batch, use_cache=False).logits
        assert torch.allclose(got, expected, atol=1e-5)
        assert recorded(tracer) == eager_counts(plain, [(2, 12)], 1)
        graphs.add(counters["unique_graphs"])
    assert len(graphs) == 1
    # What the compiler noted of its kernels is known to all of them.
    notes = tracer.recording().compiled_graphs
    assert notes and any(launch.parts for launch in notes[0].launches)


@compiled_anew()
def test_what_is_compiled_under_the_next_tracer_has_notes_of_its_own() -> None:
    model, lists = small_model(), []
    for way in ("model", "layers"):
        dynamo.reset()
        with moe_trace.MoETracer(model) as tracer:
            run(ALL_WAYS[way](model), [(1, 3)])
        lists.append(tracer.recording().compiled_graphs)
    [whole], [also, layer] = lists
    assert also == whole and len(layer.launches) < len(whole.launches)


def test_a_profile_of_code_that_is_compiled_has_a_place_for_each_of_its_calls(tmp_path: Path) -> None:
    model = small_model()
    forward: Any = None
    for number in range(3):
        with moe_trace.profile(model) as prof:
            forward = torch.compile(model, backend="eager") if forward is None else forward
            run(forward, SHAPES)
        prof.export_chrome_trace(str(tmp_path / f"{number}.json"))
        run(forward, SHAPES)
    assert not moe_trace.read_summary(tmp_path / "2.json").lost.unplaced
    recording = moe_trace.read_recording(tmp_path / "2.json")
    assert len(recording.samples) == 4
    assert all(s.placement is not None for s in recording.samples)


def test_options_may_change_and_what_was_recorded_before_is_kept() -> None:
    model, plain = small_model(), small_model()
    counter = CompileCounterWithBackend("eager")
    shapes = [(2, 12)] * 4
    with moe_trace.MoETracer(model) as first:
        forward = compile_blocks(model, backend=counter)
        run(forward, shapes)
    with moe_trace.MoETracer(model, every=2, warmup=1) as second:
        run(forward, shapes, seed=5)
    assert counter.frame_count == 1
    with moe_trace.MoETracer(model, routes=True) as third:  # which other code writes
        run(forward, shapes, seed=9)
    with moe_trace.MoETracer(model) as fourth, moe_trace.MoETracer(model) as beside:
        run(forward, shapes, seed=17)
    assert counter.frame_count <= 3
    with first:
        run(forward, shapes, seed=21)
    assert counter.frame_count <= 3
    eager = [eager_counts(plain, shapes, seed) for seed in (0, 5, 9, 17, 21)]
    assert recorded(first) == [*eager[0][:4], *eager[4][:4], *eager[0][4:], *eager[4][4:]]
    assert recorded(second) == [eager[1][i] for i in (1, 3, 5, 7)]
    assert recorded(third) == eager[2]
    assert len(third.routes()) == 4 * 2 * 12
    assert recorded(fourth) == recorded(beside) == eager[3]


def test_routers_that_were_left_out_of_the_code_are_named() -> None:
    model, plain = small_model(), small_model()
    with moe_trace.MoETracer(model, layers=[1]) as tracer:
        forward = torch.compile(model, backend="eager")
        run(forward, SHAPES)
    assert recorded(tracer) == eager_counts(plain, SHAPES, 0)[2:]
    with pytest.warns(RuntimeWarning, match=r"left out model\.layers\.0\.mlp\.gate; .*recompile"):
        tracer = moe_trace.MoETracer(model)
        tracer.start()
    tracer.recompile()
    run(forward, SHAPES)
    tracer.stop()
    assert recorded(tracer) == eager_counts(plain, SHAPES, 0)


def test_what_the_first_recorded_goes_with_it_and_the_model_with_its_hooks() -> None:
    model = small_model()
    with moe_trace.MoETracer(model) as tracer:
        forward = torch.compile(model, backend="eager")
        run(forward, SHAPES)
    gone = [weakref.ref(tracer), weakref.ref(tracer._recorder)]
    del tracer
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert hooks_on(model) > 0
    with moe_trace.MoETracer(model) as second:
        run(forward, SHAPES, seed=3)
    assert recorded(second) == eager_counts(small_model(), SHAPES, 3)


def traced_block() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
    model = torch.nn.Sequential(small_model().model.layers[0].mlp)
    forward = torch.compile(model, backend="eager")
    for _ in range(2):
        with moe_trace.MoETracer(model), torch.no_grad():
            forward(torch.randn(2, 3, 32))
    return weakref.ref(model), weakref.ref(next(iter(muted._muted)))


def test_they_go_with_the_model(leak_watch: LeakWatch) -> None:
    gone = traced_block()
    dynamo.reset()
    leak_watch.start()  # which keeps what hooks are put into
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_recompile_takes_them_off_and_eager_models_get_none() -> None:
    model = small_model()
    with moe_trace.MoETracer(model):
        run(model, SHAPES)
    assert hooks_on(model) == 0
    counter = CompileCounterWithBackend("eager")
    with moe_trace.MoETracer(model) as tracer:
        forward = compile_blocks(model, backend=counter)
        run(forward, SHAPES)
    assert hooks_on(model) > 0
    tracer.recompile()
    assert hooks_on(model) == 0
    compiled = counter.frame_count
    run(forward, SHAPES)
    assert counter.frame_count > compiled
    assert len(tracer.samples()) == 4


def test_shapes_first_compiled_between_two_tracers_are_recorded_by_the_next() -> None:
    model = small_model()
    counter = CompileCounterWithBackend("eager")
    with moe_trace.MoETracer(model):
        forward = compile_blocks(model, backend=counter, dynamic=False)
        run(forward, [(2, 12)])
    run(forward, [(1, 3), (3, 40)])
    compiled = counter.frame_count
    with moe_trace.MoETracer(model) as tracer:
        run(forward, [(1, 3), (3, 40), (2, 12)])
    assert counter.frame_count == compiled
    assert recorded(tracer) == eager_counts(small_model(), [(1, 3), (3, 40), (2, 12)], 0)


@pytest.mark.parametrize("when", ["before", "between", "while"])
def test_hooks_of_the_users_run_and_cost_no_count(when: str) -> None:
    model, seen = small_model(), []

    def hook(module: Any, args: Any, output: Any) -> None:
        seen.append(1)

    gate = model.model.layers[0].mlp.gate
    if when == "before":
        gate.register_forward_hook(hook)
    with moe_trace.MoETracer(model):
        forward = compile_blocks(model, backend="eager")
        run(forward, SHAPES)
    if when == "between":
        gate.register_forward_hook(hook)
    for number in range(2):
        with moe_trace.MoETracer(model) as tracer:
            if when == "while" and number == 0:
                gate.register_forward_hook(hook)
            run(forward, SHAPES, seed=number)
        assert recorded(tracer) == eager_counts(small_model(), SHAPES, number)
    assert seen


@pytest.mark.parametrize(("way", "active"), [("blocks", False), ("function", False), ("blocks", True)])
def test_a_copy_of_the_model_is_another_model(way: str, active: bool) -> None:
    model, plain = small_model(), small_model()
    tracer = moe_trace.MoETracer(model)
    with config.patch(skip_nnmodule_hook_guards=False):  # else the copy's code may serve the model
        tracer.start()
        forward = ALL_WAYS[way](model, backend="eager")
        run(forward, [(2, 12)])
        if not active:
            tracer.stop()
        twin = copy.deepcopy(model)
        run(ALL_WAYS[way](twin, backend="eager"), [(2, 12)] * 3, seed=50)
        if not active:
            tracer.start()
        run(forward, [(2, 12)], seed=7)
        tracer.stop()
        counts = [eager_counts(plain, [(2, 12)], seed) for seed in (0, 7)]
        assert recorded(tracer) == [counts[0][0], counts[1][0], counts[0][1], counts[1][1]]
        with moe_trace.MoETracer(twin) as of_twin:
            run(ALL_WAYS[way](twin, backend="eager"), [(2, 12)])
    assert recorded(of_twin) == counts[0]


def test_a_saved_model_has_nothing_of_them() -> None:
    model = small_model()
    with moe_trace.MoETracer(model):
        run(compile_blocks(model, backend="eager"), SHAPES)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    run(loaded, SHAPES)
    assert model.state_dict().keys() == loaded.state_dict().keys()


def test_training_between_tracers_has_equal_gradients_and_counts() -> None:
    model, plain = small_model(), small_model()
    counter = CompileCounterWithBackend("eager")
    batch = token_batch(2, 12)
    forward: Any = None
    for _ in range(2):
        with moe_trace.MoETracer(model) as tracer:
            forward = torch.compile(model, backend=counter) if forward is None else forward
            model.zero_grad()
            forward(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        assert len(tracer.samples()) == 2
        model.zero_grad()
        forward(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert counter.frame_count == 1
    plain(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-5), name


def test_a_plain_profile_between_tracers_has_no_range_of_ours() -> None:
    model = small_model()
    with moe_trace.MoETracer(model):
        forward = compile_blocks(model, backend="eager")
        run(forward, SHAPES)
    with torch.profiler.profile() as prof, warnings.catch_warnings():
        run(forward, SHAPES)
        with torch.no_grad():
            model.model.layers[0].mlp.gate(torch.randn(3, 32))
    assert not [event.name for event in prof.events() if event.name.startswith("moe.")]
