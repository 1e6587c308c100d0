"""Tests of replaced routing: experts receive what the rule returned, and the model is restored afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_trace
from families.configs import BY_NAME
from models import tiny_olmoe, token_batch, watch_experts
from moe_trace.data.errors import UsageError
from moe_trace.routing import (
    confidence_threshold,
    cumulative_mass,
    drop_over_capacity,
    replace_router,
    top_k,
)
from moe_trace.routing.replace import RoutingRuleError

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Routers that differ: bias, groups, sigmoid, skips, identity experts, logits alone.
FAMILIES = (
    "mixtral",
    "gpt_oss",
    "dbrx",
    "deepseek_v3",
    "ernie4_5_moe",
    "gemma4",
    "inkling",
    "longcat_flash",
    "phimoe",
    "zaya",
)


def keep(logits: Tensor, weights: Tensor, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The real router's own choice."""
    return weights, index


def skip_last(logits: Tensor, weights: Tensor, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The last slot is skipped."""
    index = index.clone()
    index[:, -1] = -1
    return weights, index


def skip_all(logits: Tensor, weights: Tensor, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return weights, torch.full_like(index, -1)


def logits_of(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**(inputs or token_batch())).logits
    return output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_rule_that_keeps_everything_changes_no_bit(implementation: str) -> None:
    model = tiny_olmoe()
    model.set_experts_implementation(implementation)
    bare = logits_of(model)
    with replace_router(model, keep):
        assert torch.equal(logits_of(model), bare)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_skipped_slot_is_index_0_with_weight_0(implementation: str) -> None:
    model = tiny_olmoe(top_k=3)
    model.set_experts_implementation(implementation)
    with torch.no_grad(), watch_experts(model) as bare:
        plain = model(**token_batch()).logits
    with torch.no_grad(), replace_router(model, skip_last), watch_experts(model) as calls:
        with moe_trace.MoETracer(model) as tracer:
            changed = model(**token_batch()).logits
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, plain)
    np.testing.assert_array_equal(calls[0].index[:, :2], bare[0].index[:, :2])
    np.testing.assert_array_equal(calls[0].weights[:, :2], bare[0].weights[:, :2])
    for call, sample in zip(calls, tracer.samples(), strict=True):
        assert (call.index[:, 2] == 0).all() and (call.weights[:, 2] == 0).all()
        assert sample.skipped == sample.tokens == 24
        assert sample.assignments.tolist() == call.assignments(8)
        assert sample.k_histogram.tolist() == [0, 0, 24, 0]


def test_all_implementations_compute_the_same_with_skips() -> None:
    model = tiny_olmoe(top_k=3)
    results = []
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        with replace_router(model, cumulative_mass(0.4), renormalise="original"):
            results.append(logits_of(model))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_skipping_equals_a_router_of_smaller_k() -> None:
    model, smaller = tiny_olmoe(top_k=3, norm_topk_prob=False), tiny_olmoe(top_k=2, norm_topk_prob=False)
    smaller.load_state_dict(model.state_dict())
    with replace_router(model, skip_last):
        torch.testing.assert_close(logits_of(model), logits_of(smaller))


def test_skipping_everything_leaves_the_residual_stream() -> None:
    model = tiny_olmoe()
    with replace_router(model, skip_all, renormalise="one"):
        silenced = logits_of(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
    torch.testing.assert_close(silenced, logits_of(model))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("renormalise", ["none", "original", "one"])
def test_what_renormalise_does_to_the_rest(renormalise: Any, normalised: bool) -> None:
    model = tiny_olmoe(top_k=3, norm_topk_prob=normalised)
    with torch.no_grad(), watch_experts(model) as bare:
        model(**token_batch())
    with torch.no_grad(), watch_experts(model) as calls:
        with replace_router(model, skip_last, layers=[0], renormalise=renormalise):
            model(**token_batch())
    before, after = bare[0].weights.astype(np.float64), calls[0].weights.astype(np.float64)
    rest = before[:, :2].sum(-1)
    expected = {"none": rest, "original": before.sum(-1), "one": np.ones_like(rest)}[renormalise]
    np.testing.assert_allclose(after.sum(-1), expected, rtol=1e-5)
    np.testing.assert_allclose(after[:, 0] / after[:, 1], before[:, 0] / before[:, 1], rtol=1e-5)
    np.testing.assert_array_equal(calls[0].index[:, :2], bare[0].index[:, :2])


def test_layers_select_where_the_rule_runs() -> None:
    model = tiny_olmoe()
    with torch.no_grad(), replace_router(model, skip_last, layers=["L01"]), watch_experts(model) as calls:
        model(**token_batch())
    assert [bool((call.weights == 0).any()) for call in calls] == [False, True, False]


def test_the_rule_sees_the_routers_own_tensors() -> None:
    model = tiny_olmoe()
    seen: list[tuple[Tensor, ...]] = []

    def look(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tensors)
        return tensors[1], tensors[2]

    with torch.no_grad(), replace_router(model, look, layers=[0]):
        output = model(**token_batch(), output_router_logits=True, output_hidden_states=True)
    ((logits, weights, index, hidden),) = seen
    assert torch.equal(logits, output.router_logits[0])
    assert [tuple(t.shape) for t in (logits, weights, index, hidden)] == [(24, 8), (24, 2), (24, 2), (24, 32)]
    assert torch.equal(hidden @ model.model.layers[0].mlp.gate.weight.T, logits)


def test_generate_routes_every_call_by_the_rule() -> None:
    model = tiny_olmoe(top_k=3)
    with torch.no_grad(), replace_router(model, top_k(1)), moe_trace.MoETracer(model) as tracer:
        model.generate(**token_batch(2, 7), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    samples = tracer.samples()
    assert [s.tokens for s in samples if s.layer == 0] == [14, 2, 2, 2]
    assert all(s.top_k == 1 and s.skipped == 0 and s.assignments.sum() == s.tokens for s in samples)


def gradients(model: Any) -> list[Tensor]:
    batch = token_batch()
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return [layer.mlp.gate.weight.grad.clone() for layer in model.model.layers]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_flow_to_the_router(implementation: str) -> None:
    model = tiny_olmoe(top_k=3).train()
    model.set_experts_implementation(implementation)
    bare = gradients(model)
    with replace_router(model, keep):
        kept = gradients(model)
    with replace_router(model, skip_last, renormalise="original"):
        skipped = gradients(model)
    with replace_router(model, skip_all, renormalise="one"):
        nothing = gradients(model)
    for a, b, c, d in zip(bare, kept, skipped, nothing, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.isfinite(c).all() and c.abs().max() > 0
        assert not torch.allclose(a, c)
        assert torch.equal(d, torch.zeros_like(d))


def test_a_training_step_with_checkpointing_runs_the_rule_again() -> None:
    model = tiny_olmoe(top_k=3).train()
    with replace_router(model, skip_last):
        plain = gradients(model)
        # The old name warns in the newest transformers, and the new one is not in older ones.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.testing.assert_close(gradients(model), plain)


def hook_count(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_itself_afterwards_also_after_an_exception() -> None:
    model = tiny_olmoe()
    bare, hooks = logits_of(model), hook_count(model)

    def fail(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replace_router(model, fail):
        logits_of(model)
    replacement = replace_router(model, skip_last)
    assert torch.equal(logits_of(model), bare), "a replacement that was not entered is active"
    with replacement:
        pass
    replacement.remove()
    with replacement:
        assert not torch.equal(logits_of(model), bare)
        with pytest.raises(UsageError, match="already active"):
            replacement.__enter__()
    assert hook_count(model) == hooks
    assert torch.equal(logits_of(model), bare)


def test_rules_run_in_the_order_in_which_they_were_entered() -> None:
    model = tiny_olmoe(top_k=3)
    order: list[str] = []

    def note(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def rule(logits: Tensor, weights: Tensor, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            order.append(f"{name} {int((index < 0).sum())}")
            return skip_last(logits, weights, index, hidden) if name == "first" else (weights, index)

        return rule

    first = replace_router(model, note("first"), layers=[0])
    second = replace_router(model, note("second"), layers=[0])
    with first, second:
        logits_of(model)
    assert order == ["first 0", "second 24"], "the second rule must see the skips of the first as -1"
    first.__enter__()
    second.__enter__()
    first.remove()
    order.clear()
    logits_of(model)
    second.remove()
    assert order == ["second 0"]
    assert hook_count(model) == hook_count(tiny_olmoe())


def test_rules_run_before_a_tracer_whichever_came_first() -> None:
    model = tiny_olmoe(top_k=3)
    with torch.no_grad(), moe_trace.MoETracer(model) as outer, replace_router(model, skip_last):
        with moe_trace.MoETracer(model) as inner:
            model(**token_batch())
    for a, b in zip(outer.samples(), inner.samples(), strict=True):
        assert a.skipped == b.skipped == 24
        assert a.assignments.tolist() == b.assignments.tolist()


def test_a_model_with_a_rule_can_be_copied() -> None:
    model = tiny_olmoe()
    with replace_router(model, skip_last):
        copied = copy.deepcopy(model)
        assert torch.equal(logits_of(copied), logits_of(model))
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (lambda w, i: w, "a float32 tensor of shape"),
        (lambda w, i: (i, w), "a tuple of 2 .a int64 tensor"),
        (lambda w, i: (w[:, :1], i), r"\[24, 1\]"),
        (lambda w, i: (w[:3], i[:3]), r"\[3, 2\]"),
        (lambda w, i: (w[:, :0], i[:, :0]), r"\[24, 0\]"),
        (lambda w, i: None, "NoneType"),
    ],
)
def test_a_rule_of_the_wrong_form_is_named(result: Any, found: str) -> None:
    model = tiny_olmoe()
    rule: Any = lambda logits, w, i, hidden: result(w, i)  # noqa: E731
    with replace_router(model, rule), pytest.raises(RoutingRuleError, match=rf"layers\.0.*found.*{found}"):
        logits_of(model)


def test_arguments_out_of_range() -> None:
    model = tiny_olmoe()
    with pytest.raises(UsageError, match="renormalise"):
        replace_router(model, keep, renormalise="both")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="k >= 1"):
        top_k(0)
    with pytest.raises(UsageError, match="within"):
        cumulative_mass(1.5)
    with pytest.raises(UsageError, match="within"):
        confidence_threshold(-0.1)
    with pytest.raises(UsageError, match="c > 0"):
        drop_over_capacity(math.nan)
    with replace_router(model, top_k(9)), pytest.raises(UsageError, match="8"):
        logits_of(model)


# -- the ready-made rules against loops in numpy ---------------------------------------------------------

CASES = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 9),
        "experts": st.integers(2, 8),
        "slots": st.integers(1, 4),
        "seed": st.integers(0, 999),
    }
)


def draw(case: dict[str, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, weights, indices as a softmax router without renormalising makes them, and hidden states."""
    generator = torch.Generator().manual_seed(case["seed"])
    logits = torch.randn(case["tokens"], case["experts"], generator=generator, dtype=torch.float64)
    weights, index = logits.softmax(-1).topk(min(case["slots"], case["experts"]), dim=-1)
    return logits.float(), weights.float(), index, torch.zeros(case["tokens"], 2)


def probabilities(logits: Tensor) -> np.ndarray:
    exps = np.exp(logits.double().numpy())
    return exps / exps.sum(-1, keepdims=True)


@given(case=CASES, p=st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_confidence_threshold_token_by_token(case: dict[str, int], p: float) -> None:
    logits, weights, index, hidden = draw(case)
    same, kept = confidence_threshold(p)(logits, weights, index, hidden)
    assert torch.equal(same, weights)
    for t, probs in enumerate(probabilities(logits)):
        for slot, expert in enumerate(index[t].tolist()):
            if abs(probs[expert] - p) > 1e-6:
                stays = probs[expert] > p or slot == 0  # the router's first slot is its most probable
                assert kept[t, slot] == (expert if stays else -1)


@given(case=CASES, p=st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cumulative_mass_token_by_token(case: dict[str, int], p: float) -> None:
    logits, weights, index, hidden = draw(case)
    shuffled = torch.randperm(index.shape[1], generator=torch.Generator().manual_seed(case["seed"]))
    index = index[:, shuffled]
    _, kept = cumulative_mass(p)(logits, weights, index, hidden)
    for t, probs in enumerate(probabilities(logits)):
        mass, expected = 0.0, set()
        for expert in sorted(index[t].tolist(), key=lambda e: -probs[e]):
            if abs(mass - p) < 1e-6:
                break
            if mass < p:
                expected.add(expert)
            mass += probs[expert]
        else:
            assert {e for e in kept[t].tolist() if e >= 0} == expected
            assert 1 <= len(expected) <= index.shape[1]


@given(case=CASES, c=st.floats(0.1, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_drop_over_capacity_slot_by_slot(case: dict[str, int], c: float) -> None:
    logits, weights, index, hidden = draw(case)
    index = torch.where(
        index == case["experts"] - 1, -1, index
    )  # the last expert's slots are skipped already
    _, kept = drop_over_capacity(c)(logits, weights, index, hidden)
    capacity = math.ceil(c * index.numel() / case["experts"])
    taken = dict.fromkeys(range(case["experts"]), 0)
    for slot in range(index.shape[1]):
        for t in range(index.shape[0]):
            expert = int(index[t, slot])
            fits = expert >= 0 and taken[expert] < capacity
            assert kept[t, slot] == (expert if fits else -1)
            if fits:
                taken[expert] += 1


@given(case=CASES, k=st.integers(1, 8), normalised=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_top_k_is_what_a_router_of_that_k_does(case: dict[str, int], k: int, normalised: bool) -> None:
    logits, weights, index, hidden = draw(case)
    k = min(k, case["experts"])
    got_weights, got_index = top_k(k)(logits, weights * 0.5, index, hidden)
    expected, expected_index = logits.double().softmax(-1).topk(k, dim=-1)
    assert torch.equal(got_index, expected_index)
    torch.testing.assert_close(got_weights.double(), expected * 0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rule", [confidence_threshold(0.2), cumulative_mass(0.3), drop_over_capacity(0.8), top_k(1), top_k(6)]
)
def test_ready_made_rules_in_the_model(rule: Any) -> None:
    model = tiny_olmoe(top_k=3)
    bare = logits_of(model)
    with torch.no_grad(), replace_router(model, rule), watch_experts(model) as calls:
        with moe_trace.MoETracer(model) as tracer:
            changed = model(**token_batch()).logits
    assert torch.isfinite(changed).all() and not torch.equal(changed, bare)
    for call, sample in zip(calls, tracer.samples(), strict=True):
        assert sample.assignments.tolist() == call.assignments(8)
        assert sample.skipped == int((call.weights == 0).sum())


# -- other families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name: str) -> None:
    """Keeping changes no bit; skipping everything reaches the experts as index 0 with weight 0."""
    family = next(f for key, f in BY_NAME.items() if key.split("/")[0] == name)
    model = family.build()
    bare = first_tensor(family.run(model))
    with replace_router(model, keep):
        assert torch.equal(first_tensor(family.run(model)), bare)
    received: list[tuple[Tensor, Tensor]] = []
    sites = moe_trace.find_routers(model)
    with moe_trace.MoETracer(model) as tracer, replace_router(model, skip_all):
        handles = [
            site.experts.register_forward_pre_hook(lambda m, args: received.append((args[1], args[2])))
            for site in sites
            if site.experts is not None
        ]
        silenced = first_tensor(family.run(model))
    for handle in handles:
        handle.remove()
    assert received and all((i == 0).all() and (w == 0).all() for i, w in received)
    # The tracer came first, and sees what the rule made of the choice all the same.
    assert [s.skipped for s in tracer.samples()] == [i.numel() for i, _ in received]
    assert torch.isfinite(silenced).all() and not torch.equal(silenced, bare)
    assert torch.equal(first_tensor(family.run(model)), bare)


def first_tensor(output: Any) -> Tensor:
    found = next(value for value in output.values() if isinstance(value, Tensor))
    return found


@pytest.mark.parametrize("name", ["switch_transformers", "llama4"])
def test_routers_that_hand_no_weights_and_indices_are_refused(name: str) -> None:
    model = next(f for key, f in BY_NAME.items() if key.split("/")[0] == name).build()
    with pytest.raises(UsageError, match=r"hands no .weights, indices. to its experts"):
        replace_router(model, keep)
