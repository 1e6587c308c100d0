"""Tests of batches that mix prefill and decode, as in a server, split on the device by each token's stage.

The oracle is plain numpy on what the experts received, token by token.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_trace
from compiled_models import compile_inner, small_model
from models import VOCAB, watch_experts
from moe_trace.data.codec import decode_recording, encode_recording
from moe_trace.data.routes.columns import UNKNOWN
from moe_trace.read.file.filters import Filter
from moe_trace.read.reader import read_recording, read_summary
from moe_trace.record.forward.batch_tokens import DECODE, PADDING, PREFILL, BatchTokens
from moe_trace.show.tensorboard.overview import overview
from moe_trace.show.text.report import render_text

EXPERTS, LAYERS = 8, 2
SPLIT = ("prefill_tokens", "decode_tokens", "requests", "prefill_requests")


def step(*requests: tuple[int, int, int, int], size: int | None = None) -> BatchTokens:
    """From (request, position of its first token, tokens, length of its prompt)."""
    numbers, starts, tokens, prompts = zip(*requests, strict=True) if requests else ((),) * 4
    return BatchTokens.of_requests(numbers, tokens=tokens, starts=starts, decode_from=prompts, size=size)


STEPS = [
    step((0, 0, 20, 20), (1, 0, 12, 30)),  # two prompts, the second in chunks
    step((0, 20, 1, 20), (1, 12, 18, 30), (2, 0, 5, 5), size=32),
    step((0, 21, 1, 20), (1, 30, 1, 30), (2, 5, 1, 5), size=4),
    step((1, 31, 1, 30), (2, 6, 1, 5)),
    step(size=4),  # a dummy batch
    step((3, 0, 70, 70), (1, 32, 1, 30), size=80),
    step((3, 70, 1, 70)),
]


def ids_of(told: BatchTokens, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, len(told)), generator=torch.Generator().manual_seed(seed))


def decisions(steps: list[BatchTokens]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """By step and layer: the ids and weights [T, K] that the experts received in an eager run."""
    model, found = small_model(), []
    for seed, told in enumerate(steps):
        with torch.no_grad(), watch_experts(model) as calls:
            model(ids_of(told, seed), use_cache=False)
        found.append([(call.index, call.weights) for call in calls])
    return found


def counts(index: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> list[int]:
    used = index[rows][weights[rows] != 0]
    return [int((used == expert).sum()) for expert in range(EXPERTS)]


def check(samples: list[Any], steps: list[BatchTokens]) -> None:
    """Each call's split is that of its tokens."""
    truth = decisions(steps)
    assert len(samples) == LAYERS * len(steps)
    for s in samples:
        told, (index, weights) = steps[s.step], truth[s.step][s.layer]
        assert s.stage == told.stage and s.tokens == len(told)
        assert s.assignments.tolist() == counts(index, weights, np.ones(len(told), bool))
        assert s.prefill_assignments.tolist() == counts(index, weights, told.phases == PREFILL)
        assert s.decode_assignments.tolist() == counts(index, weights, told.phases == DECODE)
        assert s.padding_assignments == sum(counts(index, weights, told.phases == PADDING))
        real = [
            (r, p) for r, p in zip(told.requests.tolist(), told.phases.tolist(), strict=True) if p != PADDING
        ]
        expected = [sum(p == PREFILL for _, p in real), sum(p == DECODE for _, p in real)]
        expected += [len({r for r, _ in real}), len({r for r, p in real if p == PREFILL})]
        assert [getattr(s, name) for name in SPLIT] == expected


def test_phases_follow_positions_and_prompts() -> None:
    told = STEPS[1]
    assert told.phases.tolist() == [DECODE] + [PREFILL] * 23 + [PADDING] * 8
    assert told.positions.tolist() == [20, *range(12, 30), *range(5), *[UNKNOWN] * 8]
    assert told.requests.tolist() == [0, *[1] * 18, *[2] * 5, *[UNKNOWN] * 8]
    assert [t.stage for t in STEPS] == ["prefill", "mixed", "decode", "decode", "decode", "mixed", "decode"]
    chunk_over_the_end = step((0, 8, 4, 10))
    assert chunk_over_the_end.phases.tolist() == [PREFILL, PREFILL, DECODE, DECODE]
    with pytest.raises(ValueError, match="up to 3 tokens"):
        step((0, 0, 4, 4), size=3)
    with pytest.raises(ValueError, match="phase, request and position"):
        BatchTokens(told.phases, told.requests[1:], told.positions)


@pytest.mark.parametrize("whole", [False, True], ids=["one_by_one", "provider"])
def test_eager_calls_are_split(whole: bool) -> None:
    model = small_model()
    with moe_trace.MoETracer(model) as tracer, torch.no_grad():
        coming = iter(STEPS)
        if whole:
            tracer.describe_tokens(lambda: next(coming))
        for seed, told in enumerate(STEPS):
            if not whole:
                tracer.describe_tokens(told)
            model(ids_of(told, seed), use_cache=False)
    check(tracer.samples(), STEPS)


def test_many_forwards_of_one_size_are_reduced_together() -> None:
    steps = [step(*((r, 9 + i, 1, 9 + (i + r) % 2 * 50) for r in range(6)), size=8) for i in range(40)]
    model = small_model()
    with moe_trace.MoETracer(model) as tracer, torch.no_grad():
        coming = iter(steps)
        tracer.describe_tokens(lambda: next(coming))
        for seed, told in enumerate(steps):
            model(ids_of(told, seed), use_cache=False)
    check(tracer.samples(), steps)


def test_told_and_untold_forwards_stand_beside_each_other() -> None:
    model = small_model()
    with moe_trace.MoETracer(model) as tracer, torch.no_grad():
        for told in (STEPS[3], None, STEPS[3]):
            if told is not None:
                tracer.describe_tokens(told)
            model(ids_of(STEPS[3], 0), use_cache=False)
    samples = tracer.samples()
    assert [s.decode_tokens for s in samples] == [2, 2, None, None, 2, 2]
    assert samples[2].stage == "prefill" and samples[2].decode_assignments is None
    assert samples[2].requests is None and samples[2].padding_assignments == 0


def test_what_is_told_of_other_tokens_is_not_believed() -> None:
    model = small_model()
    with moe_trace.MoETracer(model) as tracer, torch.no_grad():
        tracer.describe_tokens(STEPS[0])
        model(ids_of(STEPS[1], 0)[:, :7], use_cache=False)
    sample = tracer.samples()[0]
    assert sample.prefill_tokens is None and sample.prefill_assignments is None and sample.requests is None


def test_a_provider_that_fails_costs_the_split_alone() -> None:
    model = small_model()
    with moe_trace.MoETracer(model) as tracer, torch.no_grad():
        tracer.describe_tokens(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
        with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
            model(ids_of(STEPS[0], 0), use_cache=False)
    sample = tracer.samples()[0]
    assert sample.assignments.sum() == 32 * 2 and sample.prefill_tokens is None


def _compiled(model: Any, seen: bool) -> Any:
    """Inside the model's forward, which the host then sees begin, or round it."""
    compiled = compile_inner if seen else torch.compile
    return compiled(model, backend="aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("seen", [True, False], ids=["host_sees_forwards", "host_sees_none"])
def test_compiled_calls_are_split(seen: bool) -> None:
    """Raw in two sizes, and reduced in the graph: 4, 32 and 80 tokens."""
    model = small_model()
    steps = [STEPS[1], STEPS[2], STEPS[5], STEPS[1], STEPS[2]]
    with moe_trace.MoETracer(model) as tracer, torch.no_grad():
        tracer.count_steps_by_hand()
        tracer.describe_tokens(steps[0])
        forward = _compiled(model, seen)
        for seed, told in enumerate(steps):
            tracer.describe_tokens(told)
            forward(ids_of(told, seed), use_cache=False)
            tracer.step()
    samples = tracer.samples()
    assert all(s.in_graph for s in samples)
    check(samples, steps)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_compiler")
def test_routes_tell_request_position_and_phase(compiled: bool) -> None:
    model, steps = small_model(), [STEPS[1], STEPS[2], STEPS[1]] if compiled else STEPS
    with moe_trace.MoETracer(model, routes=True) as tracer, torch.no_grad():
        coming = iter(steps)
        tracer.describe_tokens(lambda: next(coming))
        forward = _compiled(model, True) if compiled else model
        for seed, told in enumerate(steps):
            forward(ids_of(told, seed), use_cache=False)
    routes = tracer.routes()
    assert routes.sequence.tolist() == np.concatenate([t.requests for t in steps]).tolist()
    assert routes.position.tolist() == np.concatenate([t.positions for t in steps]).tolist()
    assert routes.padding.tolist() == np.concatenate([t.phases == PADDING for t in steps]).tolist()
    real = ~routes.padding
    expected = np.concatenate([np.where(t.phases == DECODE, "decode", "prefill") for t in steps])
    assert routes.stage[real].tolist() == expected[real].tolist()
    for layer in range(LAYERS):
        ids = np.concatenate([call[layer][0] for call in decisions(steps)])
        assert routes.expert_ids[:, layer].tolist() == ids.tolist()


def traced(path: Path) -> Path:
    """The trace of all steps."""
    model = small_model()
    tracer = moe_trace.MoETracer(model)
    with tracer, torch.profiler.profile() as prof, torch.no_grad():
        coming = iter(STEPS)
        tracer.describe_tokens(lambda: next(coming))
        for seed, told in enumerate(STEPS):
            model(ids_of(told, seed), use_cache=False)
    prof.export_chrome_trace(str(path))
    return path


def test_a_report_has_the_stages_of_mixed_steps_apart(tmp_path: Path) -> None:
    summary = read_summary(traced(tmp_path / "trace.json"))
    check([*summary.samples], STEPS)
    assert list(summary.stages) == ["prefill", "decode", "mixed"] and summary.stage is None
    truth = decisions(STEPS)
    steps = {"prefill": [0, 1, 5], "decode": [1, 2, 3, 4, 5, 6], "mixed": [1, 5]}
    for stage, part in summary.stages.items():
        phase = {"prefill": PREFILL, "decode": DECODE}.get(stage)
        for layer, router in enumerate(part.routers):
            expected = np.zeros(EXPERTS, int)
            for i in steps[stage]:
                whole = phase is None or STEPS[i].stage != "mixed"
                rows = np.ones(len(STEPS[i]), bool) if whole else STEPS[i].phases == phase
                expected += counts(*truth[i][layer], rows)
            assert list(router.assignments) == expected.tolist(), (stage, layer)
            assert router.calls == len(steps[stage])
    requests = {stage: part.totals.requests_per_forward for stage, part in summary.stages.items()}
    assert requests == {
        "prefill": (2 + 2 + 1) / 3,
        "decode": (1 + 3 + 2 + 0 + 1 + 1) / 6,
        "mixed": (3 + 2) / 2,
    }
    # The time of a mixed step is that of the whole: neither stage takes a share of it.
    timed = {stage: set(part.times.samples.step.tolist()) for stage, part in summary.stages.items()}
    assert timed == {"prefill": {0}, "decode": {2, 3, 4, 6}, "mixed": {1, 5}}
    host = summary.stages["decode"].routers[0].latency.host
    assert host is not None and host.total < summary.totals.router_host_us
    text = " ".join(render_text(summary).split())
    assert "mixed (4 calls)" in text and "2.5 requests a forward" in text
    assert "1.7 requests a forward" in overview(summary)["stages"][0]["counted"]


def test_a_filter_takes_the_part_of_a_stage(tmp_path: Path) -> None:
    path = traced(tmp_path / "trace.json")
    prefill = read_summary(path, chosen=Filter(stages=frozenset(["prefill"])))
    assert prefill.stage == "prefill" and not prefill.stages
    assert prefill.totals.tokens == LAYERS * sum(t.prefill_tokens for t in STEPS)
    for sample in prefill.samples:
        assert sample.tokens * 2 == sample.assignments.sum() + sample.skipped
        whole = STEPS[sample.step].stage == "prefill"
        assert (sample.router_entropy is not None) == (sample.placement is not None) == whole
    both = read_summary(path, chosen=Filter(stages=frozenset(["prefill", "decode"])))
    assert both.totals.tokens == LAYERS * sum(map(len, STEPS))


def test_files_without_the_columns_say_unknown(tmp_path: Path) -> None:
    recording = read_recording(traced(tmp_path / "trace.json"))
    payload = json.loads(encode_recording(recording))
    for name in (*SPLIT, "prefill_assignments", "decode_assignments"):
        del payload["samples"][name]
    for sample in decode_recording(payload).samples:
        assert all(getattr(sample, name) is None for name in (*SPLIT, "decode_assignments"))
    bare = replace(recording, samples=decode_recording(payload).samples)
    assert json.loads(encode_recording(bare))["samples"].keys() == payload["samples"].keys()
