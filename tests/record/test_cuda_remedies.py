"""Tests that the advice on unplaced calls in CUDA graphs works: if it is followed, the calls are placed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

import moe_trace
from graph_models import BOTH, capture, gpu_model, ids
from moe_trace.timeline.correlate import reasons

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("fresh_compiler")]

STEPS, LAYERS = 4, 2


def unplaced(
    step: Callable[[Any], None], forward: Callable[[], Any], model: Any, path: Path
) -> dict[str, int]:
    """Calls without a place, by reason, of some profiled steps."""
    tracer = moe_trace.MoETracer(model)
    static = ids(2, 8, seed=0)  # the graph reads it in each replay, so it must live as long
    with torch.no_grad(), tracer:
        forward()
        replay = capture(model, static).replay
        with profile(activities=BOTH) as prof:
            prof.step()
            for _ in range(STEPS):
                step((prof, replay, forward))
            torch.cuda.synchronize()
        prof.export_chrome_trace(str(path))
    return tracer.recording().lost.unplaced


@torch.no_grad()
def test_a_step_after_each_replay(tmp_path: Path) -> None:
    model = gpu_model()

    def step(given: Any) -> None:
        prof, replay, _ = given
        replay()
        prof.step()

    assert unplaced(step, lambda: model(ids(2, 8, seed=1), use_cache=False), model, tmp_path / "t.json") == {}


@pytest.mark.parametrize("on_it", [False, True])
@torch.no_grad()
def test_a_step_where_the_stream_of_the_replays_is_current(on_it: bool, tmp_path: Path) -> None:
    model, stream = gpu_model(), torch.cuda.Stream()

    def step(given: Any) -> None:
        prof, replay, _ = given
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            replay()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.stream(stream) if on_it else nullcontext():
            prof.step()

    def forward() -> None:
        model(ids(2, 8, seed=1), use_cache=False)

    found = unplaced(step, forward, model, tmp_path / "t.json")
    # The first mark is on the stream that was current before: that step's calls stay without a place.
    assert found.keys() <= {reasons.OTHER_STREAM}
    assert found.get(reasons.OTHER_STREAM, 0) == LAYERS * (1 if on_it else STEPS)


@pytest.mark.parametrize("between", [False, True])
@torch.no_grad()
def test_a_step_between_replays_and_forwards_that_the_host_sees(between: bool, tmp_path: Path) -> None:
    model = gpu_model()

    def step(given: Any) -> None:
        prof, replay, forward = given
        replay()
        if between:
            prof.step()
        forward()
        prof.step()

    def forward() -> None:
        model(ids(2, 8, seed=1), use_cache=False)

    found = unplaced(step, forward, model, tmp_path / "t.json")
    assert found.keys() <= (set() if between else {reasons.MIXED})


@pytest.mark.parametrize("what", ["model", "function"])
@torch.no_grad()
def test_compiling_the_model_itself(what: str, tmp_path: Path) -> None:
    model = gpu_model()

    def call(tokens: torch.Tensor) -> Any:
        return model(tokens, use_cache=False).logits * 1.0

    options = {"mode": "reduce-overhead", "fullgraph": True}
    compiled = torch.compile(model if what == "model" else call, **options)
    with moe_trace.MoETracer(model) as tracer:
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(ids(2, 8, seed=0), **({"use_cache": False} if what == "model" else {}))
        with profile(activities=BOTH) as prof:
            for seed in range(STEPS):
                torch.compiler.cudagraph_mark_step_begin()
                compiled(ids(2, 8, seed=seed), **({"use_cache": False} if what == "model" else {}))
                if what == "model":
                    prof.step()
            torch.cuda.synchronize()
        prof.export_chrome_trace(str(tmp_path / "t.json"))
    found = tracer.recording().lost.unplaced.keys()
    others = {reasons.NO_LAUNCH, reasons.UNKNOWN_GRAPH, reasons.OTHER_COUNT, reasons.NO_MARK}
    assert found <= (set() if what == "model" else others)
