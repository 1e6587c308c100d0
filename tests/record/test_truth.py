"""Tests of metrics against what the experts received and float64 numpy on the model's logits."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import moe_trace
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.demo import DEMO_PROMPTS, load_demo_model

CONFIGS = st.fixed_dictionaries(
    {
        "experts": st.integers(2, 12),
        "top_k": st.integers(1, 4),
        "layers": st.integers(1, 3),
        "batch": st.integers(1, 3),
        "length": st.integers(1, 17),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "implementation": st.sampled_from(["eager", "grouped_mm", "batched_mm"]),
        "normalised": st.booleans(),
    }
)


def assert_same_assignments(samples: list[Any], calls: list[Any], experts: int) -> None:
    """Per layer and in order of the calls; layers are compared as multisets of (layer, counts) in order."""
    seen: Counter[int] = Counter()
    by_layer: dict[int, list[list[int]]] = {}
    for call in calls:
        by_layer.setdefault(call.layer, []).append(call.assignments(experts))
    for sample in samples:
        expected = by_layer[sample.layer][seen[sample.layer]]
        assert sample.assignments.tolist() == expected
        assert sample.assignments.sum() == sample.tokens * sample.top_k - sample.skipped
        seen[sample.layer] += 1
    assert {layer: len(counts) for layer, counts in by_layer.items()} == dict(seen)


@given(config=CONFIGS)
@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_assignments_equal_what_the_experts_received(config: dict[str, Any]) -> None:
    model = tiny_olmoe(
        layers=config["layers"],
        experts=config["experts"],
        top_k=min(config["top_k"], config["experts"]),
        norm_topk_prob=config["normalised"],
    ).to(config["dtype"])
    model.set_experts_implementation(config["implementation"])
    batch = token_batch(config["batch"], config["length"])
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        model(**batch)
        model(**batch)
    assert len(calls) == 2 * config["layers"]
    assert_same_assignments(tracer.samples(), calls, config["experts"])


def test_generate_is_recorded_call_by_call() -> None:
    model = tiny_olmoe()
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        model.generate(**token_batch(2, 7), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    samples = tracer.samples()
    assert_same_assignments(samples, calls, 8)
    first_layer = [s for s in samples if s.layer == 0]
    assert [(s.tokens, s.stage) for s in first_layer] == [(14, "prefill")] + [(2, "decode")] * 3
    assert [s.call for s in first_layer] == [0, 1, 2, 3]


def test_demo_model_over_its_prompts() -> None:
    model, tokenizer = load_demo_model()
    batch = tokenizer(list(DEMO_PROMPTS.values()), return_tensors="pt", padding=True)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    samples = tracer.samples()
    assert_same_assignments(samples, calls, 16)
    padding = int((batch["attention_mask"] == 0).sum())
    assert padding > 0
    assert all(s.padding_assignments == padding * 4 for s in samples)
    assert max(moe_trace_summary.load.max_over_mean for moe_trace_summary in tracer.summary().routers) > 1.2


def numpy_figures(logits_TE: np.ndarray, index_TK: np.ndarray) -> dict[str, float]:
    """The definitions, in float64."""
    x = logits_TE.astype(np.float64)
    highest = x.max(-1, keepdims=True)
    logsumexp = highest[:, 0] + np.log(np.exp(x - highest).sum(-1))
    p = np.exp(x - logsumexp[:, None])
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    return {
        "router_entropy": entropy.mean(),
        "confidence": 1 - entropy.mean() / math.log(x.shape[-1]),
        "top1_prob": p.max(-1).mean(),
        "topk_mass": np.take_along_axis(p, index_TK, -1).sum(-1).mean(),
        "z_loss": (logsumexp**2).mean(),
    }


@pytest.mark.parametrize(("experts", "top_k", "length"), [(8, 2, 40), (64, 8, 9), (3, 1, 1)])
def test_logit_figures_equal_float64(experts: int, top_k: int, length: int) -> None:
    model = tiny_olmoe(experts=experts, top_k=top_k)
    batch = token_batch(2, length)
    with torch.no_grad(), watch_experts(model) as calls, moe_trace.MoETracer(model) as tracer:
        output = model(**batch, output_router_logits=True)
    samples = {s.layer: s for s in tracer.samples()}
    for layer, logits in enumerate(output.router_logits):
        expected = numpy_figures(logits.numpy(), calls[layer].index)
        for name, value in expected.items():
            assert getattr(samples[layer], name) == pytest.approx(value, rel=1e-5), (layer, name)


def test_flops_equal_the_counter_in_eager_mode() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_olmoe()
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False, depth=10) as counter, torch.no_grad():
        with moe_trace.MoETracer(model) as tracer:
            model(**token_batch())
    counts = counter.get_flop_counts()
    for sample in tracer.samples():
        prefix = f"OlmoeForCausalLM.{sample.name.rsplit('.', 1)[0]}"
        assert sum(counts[f"{prefix}.gate"].values()) == sample.router_flops
        assert sum(counts[f"{prefix}.experts"].values()) == sample.expert_flops


def test_padding_is_counted_apart_in_prefill_and_decode() -> None:
    model = tiny_olmoe()
    batch = token_batch(2, 6)
    batch["attention_mask"][0, :4] = 0
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for sample in tracer.samples():
        assert sample.padding_assignments == (4 * 2 if sample.tokens == 12 else 0)
        assert sample.assignments.sum() == sample.tokens * 2


def test_zero_weights_and_foreign_indices_are_skipped() -> None:
    from moe_trace.record.reduce.stats import routing_stats

    index = torch.tensor([[[0, 1], [-1, 2], [3, 7]]])
    weights = torch.tensor([[[0.5, 0.0], [0.5, 0.5], [0.5, 0.5]]])
    padding = torch.tensor([[True, False, False]])
    ints = routing_stats(torch.zeros(1, 3, 4), weights, index, 4, padding).ints[0]
    assert ints.tolist() == [1, 0, 1, 1, 1, 2, 0, 3, 0, 1, 3]


def test_nan_logits_are_counted_and_leave_the_rest_finite() -> None:
    from moe_trace.record.reduce.stats import FLOAT_FIELDS, routing_stats

    logits = torch.randn(2, 5, 8)
    clean = routing_stats(logits, torch.ones(2, 5, 2), torch.ones(2, 5, 2, dtype=torch.long), 8, None)
    logits_with_nan = torch.cat([logits, torch.full((2, 1, 8), math.nan)], dim=1)
    index = torch.ones(2, 6, 2, dtype=torch.long)
    dirty = routing_stats(logits_with_nan, torch.ones(2, 6, 2), index, 8, None)
    assert dirty.ints[:, -1].tolist() == [5, 5]
    assert len(FLOAT_FIELDS) == dirty.floats.shape[1]
    per_token = slice(0, FLOAT_FIELDS.index("load_x_prob"))  # that one has the slots of the NaN token too
    torch.testing.assert_close(dirty.floats[:, per_token], clean.floats[:, per_token])
    assert dirty.floats.isfinite().all()


def test_masked_experts_do_not_poison_the_entropy() -> None:
    from moe_trace.record.reduce.stats import routing_stats

    logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
    stats = routing_stats(logits, torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), 3, None)
    assert stats.ints[0, -1] == 1
    assert stats.floats[0, 0] == pytest.approx(math.log(2), rel=1e-6)


def test_model_with_nan_weights_is_reported() -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0].fill_(math.nan)
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**token_batch(1, 4))
    summary = tracer.summary()
    assert summary.routers[1].nonfinite_tokens == 4
    assert summary.routers[1].decisions.entropy_mean is None
    assert summary.routers[0].decisions.entropy_mean is not None
    assert any("NaN" in note for note in summary.notes)


@pytest.mark.parametrize("training", [False, True])
def test_model_is_bit_equal_with_and_without_the_tracer(training: bool) -> None:
    def outcome(traced: bool) -> list[torch.Tensor]:
        model = tiny_olmoe().train(training)
        batch = token_batch()
        tracer = moe_trace.MoETracer(model)
        if traced:
            tracer.start()
        result = model(**batch, labels=batch["input_ids"])
        if training:
            result.loss.backward()
        tracer.stop() if traced else None
        gradients = [p.grad for p in model.parameters()] if training else []
        return [result.logits.detach(), result.loss.detach(), *gradients]

    for bare, traced in zip(outcome(False), outcome(True), strict=True):
        assert torch.equal(bare, traced)


def test_recomputed_calls_are_marked_and_not_added_to_the_load() -> None:
    model = tiny_olmoe().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = token_batch()
    with moe_trace.MoETracer(model) as tracer:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    phases = Counter((s.layer, s.phase) for s in tracer.samples())
    assert phases == Counter({(layer, phase): 1 for layer in range(3) for phase in ("forward", "recompute")})
    for router in tracer.summary().routers:
        assert sum(router.assignments) == batch["input_ids"].numel() * 2
        assert (router.calls, router.recomputed_calls) == (1, 1)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_stage_is_told_by_the_cache_under_its_old_name_and_its_new(name: str) -> None:
    """transformers 5.24 renamed the argument."""
    model = tiny_olmoe()
    inner = model.forward
    model.forward = {  # the name that this installation's model has is not the one under test
        "cache": lambda input_ids, attention_mask=None, cache=None: inner(
            input_ids, attention_mask=attention_mask, **{_cache_name(inner): cache}
        ),
        "past_key_values": lambda input_ids, attention_mask=None, past_key_values=None: inner(
            input_ids, attention_mask=attention_mask, **{_cache_name(inner): past_key_values}
        ),
    }[name]
    ids = token_batch(2, 7)["input_ids"]
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        cache = DynamicCache(config=model.config)
        model(ids, attention_mask=mask[:, :7], **{name: cache})
        model(ids[:, :1], attention_mask=mask, **{name: cache})
    recording = tracer.recording()
    first_layer = [s for s in recording.samples if s.layer == 0]
    assert [(s.stage, s.padding_assignments) for s in first_layer] == [("prefill", 6), ("decode", 0)]
    assert recording.lost.padding_unknown == 0


def _cache_name(forward: Any) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
