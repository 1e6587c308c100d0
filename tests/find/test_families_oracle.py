"""Tests of the bench of families and its oracles, without moe_trace."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

from families import dense, discovery
from families.configs import BROKEN, BY_NAME, FAMILIES
from families.family import TRAITS, Family, use_experts
from families.flops_oracle import CallFlops, count_flops
from families.oracle import Intervention, Truth
from families.sites import Call, Site, expert_weights, find_sites

torch.set_num_threads(1)

SUSPECTS_WITHOUT_EXPERTS = {
    "granite_docling": "DensityRouter gives one logit a sample",
    "kyutai_speech_to_text": "GatingMLP is a gated linear unit",
    "moshi": "GatingMLP is a gated linear unit",
}
TOP_K_EXPERTS = [family for family in FAMILIES if family.contract == "topk-experts"]
WITH_CHOICE = [family for family in FAMILIES if family.implementations]

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
topk_family = pytest.mark.parametrize("family", TOP_K_EXPERTS, ids=lambda family: family.name)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one forward of a family did."""

    finite: bool
    calls: list[Call]
    truths: list[Truth]
    flops: list[CallFlops]
    logits: list[torch.Tensor | None]
    """Element 0 of the router's output, for each call; ``None`` where that is no [T, E]."""
    expert_sizes: dict[str, int]
    """Path of the experts -> weights of one of them, biases left out."""


@functools.cache
def evidence(family: Family) -> Evidence:
    model = family.build()
    with Intervention(model) as watch, RouterOutputs(model, watch.sites) as routers:
        output = family.run(model)
    return Evidence(
        finite=all(torch.isfinite(value).all() for value in tensors_of(output)),
        calls=watch.calls,
        truths=watch.truths(),
        flops=count_flops(model, functools.partial(family.run, model)),
        logits=routers.logits,
        expert_sizes={path: expert_size(site) for path, site in watch.sites.items()},
    )


def tensors_of(output: Any) -> list[torch.Tensor]:
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


def expert_size(site: Site) -> int:
    return sum(weight.numel() for weight in expert_weights(site.module)[0] if weight.ndim == 2)


class RouterOutputs:
    """Keeps element 0 of what the routers of topk-experts families return."""

    def __init__(self, model: nn.Module, sites: dict[str, Site]) -> None:
        self.logits: list[torch.Tensor | None] = []
        routers = [model.get_submodule(site.router_path) for site in sites.values() if site.router_path]
        self._handles = [router.register_forward_hook(self._keep) for router in routers]

    def __enter__(self) -> "RouterOutputs":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        logits = output if isinstance(output, torch.Tensor) else output[0]
        usable = isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.is_floating_point()
        self.logits.append(logits.detach().clone() if usable else None)


def given_pairs(call: Call, real_experts: int) -> set[tuple[int, int]]:
    """(token, expert) of the indices that the experts received, without identity experts and skips."""
    _, index_TK, weights_TK = call.args
    return {
        (token, expert)
        for token, (experts, weights) in enumerate(zip(index_TK.tolist(), weights_TK.tolist(), strict=True))
        for expert, weight in zip(experts, weights, strict=True)
        if expert < real_experts and weight != 0
    }


# --- the bench ---


def test_every_family_with_experts_is_in_the_bench() -> None:
    missing = discovery.folders_with_experts() - {family.folder for family in FAMILIES}
    assert not missing, (
        f"transformers has new families with experts: add them to configs.py: {sorted(missing)}"
    )


def test_no_class_of_another_family_looks_like_experts() -> None:
    bench = {family.folder for family in FAMILIES}
    suspects = {
        folder: names
        for folder, names in discovery.folders_with_suspect_names().items()
        if folder not in bench
    }
    new = {folder: names for folder, names in suspects.items() if folder not in SUSPECTS_WITHOUT_EXPERTS}
    assert not new, f"read these classes and add them to the bench, or to the list of harmless names: {new}"


def test_names_are_unique_and_traits_are_known() -> None:
    assert len(BY_NAME) == len(FAMILIES)
    assert {trait for family in FAMILIES for trait in family.traits} <= set(TRAITS)


@every_family
def test_a_forward_runs_and_calls_the_experts(family: Family) -> None:
    seen = evidence(family)
    assert seen.finite
    assert len(seen.truths) == family.calls


@pytest.mark.parametrize("family", BROKEN, ids=lambda family: family.name)
def test_what_is_left_out_fails_by_itself(family: Family) -> None:
    with pytest.raises(AttributeError):
        family.run(family.build())


@every_family
def test_two_builds_are_the_same_model(family: Family) -> None:
    first, second = family.build().state_dict(), family.build().state_dict()
    differing = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not differing


@every_family
def test_padded_inputs_run(family: Family) -> None:
    model = family.build()
    for padding in ("left", "right"):
        output = family.run(model, family.make_inputs(padding))
        assert all(torch.isfinite(value).all() for value in tensors_of(output))


@every_family
def test_choice_of_implementation_is_as_declared(family: Family) -> None:
    assert use_experts(family.build(), "grouped_mm") is family.implementations


@pytest.mark.parametrize("trait", ["skip-is-zero-weight", "drops-tokens", "identity-experts"])
def test_what_is_special_does_happen(trait: str) -> None:
    """Otherwise a reader that has never heard of it would pass."""
    for family in (family for family in FAMILIES if trait in family.traits):
        fewest = min(int(truth.experts_per_token.min()) for truth in evidence(family).truths)
        usual = (
            max(call.args[1].shape[-1] for call in evidence(family).calls)
            if trait == "identity-experts"
            else 1
        )
        assert fewest < usual, f"{family.name}: choose another seed"


@topk_family
def test_selection_bias_is_strong_enough_to_be_missed(family: Family) -> None:
    """Top-k of the logits finds the truth in exactly those families that have no other rule of selection."""
    seen = evidence(family)
    agree = []
    for call, truth, logits_TE in zip(seen.calls, seen.truths, seen.logits, strict=True):
        assert logits_TE is not None
        top = logits_TE.topk(call.args[1].shape[-1]).indices.tolist()
        pairs = {(token, expert) for token, row in enumerate(top) for expert in row if expert < truth.experts}
        agree.append(pairs == set(truth.pairs))
    assert all(agree) is ("selection-bias" not in family.traits)


# --- the truth ---


@every_family
def test_every_token_has_k_experts(family: Family) -> None:
    if family.k is None:
        pytest.skip("depends on the token")
    for truth in evidence(family).truths:
        assert set(truth.experts_per_token.tolist()) == {family.k}
        assert truth.assignments.sum() == truth.tokens * family.k


@topk_family
def test_experts_receive_the_truth(family: Family) -> None:
    """By position: hidden, index, weights. This is what hooking the experts rests on."""
    seen = evidence(family)
    for call, truth in zip(seen.calls, seen.truths, strict=True):
        assert not call.kwargs
        assert call.args[1].dtype == torch.int64
        assert given_pairs(call, truth.experts) == set(truth.pairs)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", WITH_CHOICE, ids=lambda family: family.name)
def test_truth_does_not_depend_on_the_implementation(family: Family, implementation: str) -> None:
    model = family.build()
    use_experts(model, implementation)
    with Intervention(model) as watch:
        family.run(model)
    assert watch.truths() == evidence(family).truths


def test_nllb_runs_other_experts_than_it_chose() -> None:
    family = BY_NAME["nllb_moe/seq2seq"]
    for truth in evidence(family).truths:
        assert truth.defect
        assert {expert for _, expert in truth.pairs} == {0, 1}


def test_llama4_moves_only_the_rows_that_were_scored() -> None:
    seen = evidence(BY_NAME["llama4/text"])
    for call, truth in zip(seen.calls, seen.truths, strict=True):
        rows = call.args[0].view(truth.experts, truth.tokens, -1).any(dim=-1)
        assert truth.pairs == {(token, expert) for expert, token in rows.nonzero().tolist()}


def test_capacity_drops_tokens() -> None:
    full, tight = BY_NAME["switch_transformers/seq2seq"], BY_NAME["switch_transformers/dropping"]
    first_full, first_tight = evidence(full).truths[0], evidence(tight).truths[0]
    assert first_tight.pairs < first_full.pairs


def test_mixed_tokens_split_between_the_routers_of_a_layer() -> None:
    text, vision, *_ = evidence(BY_NAME["ernie4_5_vl_moe/mixed"]).truths
    assert (text.tokens, vision.tokens) == (9, 5)
    assert text.router_path != vision.router_path


def test_intervention_contradicts_a_lying_router() -> None:
    """The oracle must be able to fail: here the experts compute others than they are told."""
    family = BY_NAME["mixtral/text"]
    model = family.build()
    liar = model.get_submodule("model.layers.1.mlp.experts")
    honest = liar.forward

    def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return honest(hidden, (top_k_index + 1) % 8, weights)

    liar.forward = forward
    with Intervention(model) as watch:
        family.run(model)
    agree = [
        given_pairs(call, 8) == set(truth.pairs)
        for call, truth in zip(watch.calls, watch.truths(), strict=True)
    ]
    assert agree == [True, False, True]


def test_intervention_leaves_the_model_as_it_was() -> None:
    family = BY_NAME["deepseek_v3/text"]
    model = family.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Intervention(model) as watch:
        family.run(model)
    watch.truths()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- FLOPs ---


@topk_family
def test_flops_of_experts_follow_the_assignments(family: Family) -> None:
    seen = evidence(family)
    for call, truth, flops in zip(seen.calls, seen.truths, seen.flops, strict=True):
        skipped = call.args[1].numel() - len(truth.pairs) if "skip-is-zero-weight" in family.traits else 0
        pairs = len(truth.pairs) + skipped  # a skipped slot is computed all the same, on expert 0
        assert flops.experts == 2 * seen.expert_sizes[truth.path] * pairs


@every_family
def test_flops_belong_to_the_same_calls(family: Family) -> None:
    seen = evidence(family)
    assert [(flops.path, flops.call) for flops in seen.flops] == [(t.path, t.call) for t in seen.truths]
    assert all(flops.router > 0 for flops in seen.flops) is ("no-router" not in family.traits)


def test_flops_of_the_families_with_another_contract() -> None:
    llama4 = evidence(BY_NAME["llama4/text"]).flops[0]
    assert llama4.experts == 2 * (64 * 192 + 96 * 64) * 14 * 8, "every expert computes every token"
    doge = evidence(BY_NAME["doge/text"]).flops[0]
    assert doge.experts == 4 * 64 * 14 * 2, "two rows of hidden size for each pair"
    attention, mlp, *_ = evidence(BY_NAME["jetmoe/text"]).flops
    assert attention.experts == 2 * (2 * 64 * 32) * 14 * 2
    assert mlp.experts == 2 * (64 * 192 + 96 * 64) * 14 * 2
    nllb = evidence(BY_NAME["nllb_moe/seq2seq"]).flops[0]
    assert nllb.experts == 2 * (2 * 64 * 96) * (7 * 14 + 14), (
        "the defect computes a row for every expert not chosen"
    )


# --- dense models ---


@pytest.mark.parametrize("family", dense.DENSE, ids=lambda family: family.name)
def test_dense_models_hold_no_experts(family: Family) -> None:
    assert find_sites(family.build()) == []
