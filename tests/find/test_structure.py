"""Tests of routers recognised by structure: each form of output is read correctly, and only routers match."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_trace
from moe_trace.data.errors import NoRoutersFound
from moe_trace.find.structure.router_beside_experts import find_router_beside_experts

DIM, EXPERTS, TOP_K = 16, 6, 2
Form = Callable[[Tensor, Tensor, Tensor], Any]


class Router(nn.Module):
    """Chooses the top-k of a linear layer, and returns it in one of the forms that frameworks use."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.top_k, self.form = TOP_K, form

    def forward(self, x: Tensor) -> Any:
        scores = self.gate(x).softmax(-1)
        weights, index = scores.topk(TOP_K, dim=-1)
        self.chosen = index.detach().flatten(0, -2)
        return self.form(scores, weights, index)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.router, self.experts = Router(form), Experts()

    def forward(self, x: Tensor) -> Tensor:
        self.router(x)
        return self.experts(x)


def chosen_map(scores: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)


def combine_mask(scores: Tensor, index: Tensor) -> Tensor:
    """[T, E, C] as GShard builds it, with room for every token."""
    chosen = chosen_map(scores, index)
    place = chosen.long().cumsum(0) - 1
    return nn.functional.one_hot(place.clamp(min=0), len(scores)) * (scores * chosen)[..., None]


FORMS: dict[str, Form] = {
    "torchtitan": lambda s, w, i: (w, i, s),
    "olmo_core": lambda s, w, i: (w, i, torch.bincount(i.flatten(), minlength=EXPERTS), None),
    "automodel": lambda s, w, i: (w, i.int(), None),
    "deepseek_remote": lambda s, w, i: (i, w, s.mean()),
    "deepseek_v3_remote": lambda s, w, i: (i, w),
    "nomic": lambda s, w, i: (s, w, i),
    "dense_weights": lambda s, w, i: (s * chosen_map(s, i), i),
    "megatron": lambda s, w, i: (s * chosen_map(s, i), chosen_map(s, i)),
    "deepspeed": lambda s, w, i: (s.mean(), m := combine_mask(s, i), m > 0, chosen_map(s, i).sum(0)),
    "deepspeed_sparse": lambda s, w, i: (s.mean(), 9, EXPERTS, i.t().int(), i.t().int() * 0, w.t(), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_choice_and_the_logits(form: str) -> None:
    block = Block(FORMS[form])
    x = torch.randn(9, DIM)
    with moe_trace.MoETracer(block) as tracer:
        block(x)
    (sample,) = tracer.samples()
    expected = torch.bincount(block.router.chosen.flatten(), minlength=EXPERTS).tolist()
    assert list(sample.assignments) == expected
    entropy = torch.distributions.Categorical(logits=block.router.gate(x)).entropy().mean().item()
    assert sample.router_entropy == pytest.approx(entropy, rel=1e-4)


def test_a_batch_dimension_is_flattened() -> None:
    block = Block(FORMS["torchtitan"])
    with moe_trace.MoETracer(block) as tracer:
        block(torch.randn(2, 5, DIM))
    (sample,) = tracer.samples()
    assert (sample.tokens, sum(sample.assignments)) == (10, 10 * TOP_K)


@pytest.mark.parametrize("form", ["deepspeed_sparse", "megatron"])
def test_dropped_slots_are_skipped_and_not_counted(form: str) -> None:
    def dropping(scores: Tensor, weights: Tensor, index: Tensor) -> Any:
        parts = list(FORMS[form](scores, weights, index))
        if form == "megatron":
            parts[1] = parts[1].clone()
            parts[1][0] = False
        else:
            parts[3] = parts[3].clone()
            parts[3][:, 0] = -1
        return tuple(parts)

    block = Block(dropping)
    with moe_trace.MoETracer(block) as tracer:
        block(torch.randn(9, DIM))
    (sample,) = tracer.samples()
    expected = torch.bincount(block.router.chosen[1:].flatten(), minlength=EXPERTS).tolist()
    assert list(sample.assignments) == expected
    assert sample.skipped == TOP_K


@pytest.mark.parametrize(
    "form",
    [
        lambda s, w, i: s,  # weights over all experts: every one computes
        lambda s, w, i: (w, i, i),  # two tensors that may be the ids
        lambda s, w, i: i,  # no weights
        lambda s, w, i: (w, w, i),
    ],
)
def test_what_tells_no_decision_is_refused_with_what_was_seen(form: Form) -> None:
    block = Block(form)
    with pytest.warns(RuntimeWarning, match="found"), moe_trace.MoETracer(block) as tracer:
        block(torch.randn(9, DIM))
    assert tracer.samples() == []
    assert "tensor of shape" in str(tracer.recording().lost.misread)


def test_ids_of_one_expert_a_token_are_not_mistaken_for_figures_of_the_experts() -> None:
    """[T] ids with [T] weights are a decision; [E] counts with [E] shares beside them are none."""

    def one_each(scores: Tensor, weights: Tensor, index: Tensor) -> Any:
        return index[:, 0], weights[:, 0]

    def figures(scores: Tensor, weights: Tensor, index: Tensor) -> Any:
        return scores, torch.bincount(index.flatten(), minlength=EXPERTS), scores.mean(0)

    for form, understood in ((one_each, True), (figures, False)):
        block = Block(form)
        block.router.top_k = 1
        with warnings.catch_warnings(), moe_trace.MoETracer(block) as tracer:
            warnings.simplefilter("ignore")
            block(torch.randn(EXPERTS, DIM))
        expected = torch.bincount(block.router.chosen[:, 0], minlength=EXPERTS).tolist()
        assert [s.assignments.tolist() for s in tracer.samples()] == ([expected] if understood else [])


@pytest.mark.parametrize("told", ["right", "before drops", "wrong", "a share"])
def test_counts_in_the_routers_own_words_are_compared_and_never_the_source(told: str) -> None:
    def form(scores: Tensor, weights: Tensor, index: Tensor) -> Any:
        counts = torch.bincount(index.flatten(), minlength=EXPERTS)
        if told == "before drops":
            index = index.clone()
            index[:2] = -1
        if told == "wrong":
            counts = counts.roll(1) + torch.arange(EXPERTS)
        return weights, index, counts / counts.sum() if told == "a share" else counts

    block, kept = Block(form), []
    block.router.register_forward_hook(lambda module, args, out: kept.append(out[1]))
    with moe_trace.MoETracer(block) as tracer, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        block(torch.randn(9, DIM))
        (sample,) = tracer.samples()
    index = kept[0]
    assert sample.assignments.tolist() == torch.bincount(index[index >= 0], minlength=EXPERTS).tolist()
    assert ["tokens per expert where its ids give" in str(one.message) for one in said] == [True] * (
        told == "wrong"
    )


# -- what is no mixture of experts ----------------------------------------------------------------------


class Holder(nn.Module):
    """A module with these children, whose class may have any name."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def named(name: str, **children: nn.Module) -> nn.Module:
    kind: Any = type(name, (Holder,), {})
    return kind(**children)


def linear(out: int = DIM) -> nn.Linear:
    return nn.Linear(DIM, out)


def several(count: int) -> nn.ModuleList:
    return nn.ModuleList(linear() for _ in range(count))


def gate(name: str = "Gate", out: int = DIM) -> nn.Module:
    return named(name, proj=linear(out))


ZOO: dict[str, nn.Module] = {
    "glu": Holder(gate=gate("GLUGate"), up=linear(), down=linear()),
    "swiglu": Holder(gate=linear(), up=linear(), down=linear()),
    "gated_mlp": Holder(gate_proj=linear(), up_proj=linear(), router=linear()),
    "lstm_gates": Holder(input_gate=gate("InputGate"), forget_gate=gate("ForgetGate"), cell=linear()),
    "lstm": nn.LSTM(DIM, DIM),
    "gru": nn.GRU(DIM, DIM),
    "highway": Holder(gate=gate("HighwayGate"), transform=linear()),
    "attention_gate": Holder(gate=gate("AttentionGate"), attention=nn.MultiheadAttention(DIM, 2)),
    "squeeze_excite": Holder(gate=gate("SEGate"), conv=nn.Conv1d(DIM, DIM, 1)),
    "detr_queries": Holder(query_router=gate("QueryRouter"), decoder=several(2)),
    "topk_proposals": Holder(topk=gate("TopKProposals"), heads=nn.ModuleList([linear(4), linear(91)])),
    "topk_pooling": Holder(pool=gate("TopKPooling", 1), conv=linear()),
    "sae_topk": Holder(encoder=gate("TopKEncoder", 4 * DIM), decoder=nn.Linear(4 * DIM, DIM)),
    "vq_codebook": Holder(gate=gate("CodeGate"), codebook=nn.Embedding(8, DIM)),
    "hash_layer": Holder(router=gate("HashRouter"), tables=nn.ModuleList([nn.Embedding(8, DIM)] * 2)),
    "packet_router": Holder(router=gate("PacketRouter"), layers=several(2)),
    "mixture_density": Holder(router=gate("DensityRouter", 3), mean=linear(3), scale=linear(3)),
    "capsule": Holder(router=gate("DynamicRouter"), capsules=several(4)),
    "early_exit": Holder(gate=gate("ExitGate", 1), exits=several(2)),
    "mixture_of_depths": Holder(router=gate("DepthRouter", 1), block=linear()),
    "adapter_gate": Holder(gate=gate("AdapterGate"), adapter=linear()),
    "lora_router": Holder(router=gate("LoraRouter"), lora_A=linear(4), lora_B=nn.Linear(4, DIM)),
    "one_expert": Holder(router=gate("Router", 1), experts=several(1)),
    "shared_only": Holder(gate=gate("Gate", 4), shared_experts=several(4)),
    "expert_of_another_number": Holder(router=gate("Router", 5), experts=several(3)),
    "expert_name_no_weights": Holder(router=gate("Router", 4), expert_names=nn.Identity()),
    "expert_head": Holder(gate=gate("Gate", 4), expert_head=linear()),
    "two_routers": Holder(a_router=gate("R", 4), b_router=gate("R", 4), experts=several(4)),
    "experts_without_router": Holder(experts=several(4), norm=nn.LayerNorm(DIM)),
    "unet_gates": Holder(gate=gate("GridGate"), down=nn.ModuleList([nn.Conv1d(DIM, DIM, 1)] * 2)),
    "resampler": Holder(router=gate("TokenRouter"), perceiver=several(2)),
    "mamba": Holder(gate=linear(), router=nn.Identity(), mixer=several(2)),
    "heads_and_a_classifier": Holder(classifier=linear(4), heads=several(4)),
    "layers_as_many_as_classes": Holder(gate=linear(4), layers=several(4)),
    "linear_beside_too_many": Holder(gate=linear(5), experts=several(4)),
    "linear_that_is_no_gate": Holder(out_proj=linear(4), experts=several(4)),
    "gate_of_one": Holder(gate=linear(1), experts=several(1)),
    "gate_of_shared_experts": Holder(shared_expert_gate=linear(4), shared_experts=several(4)),
    "gru_gates_in_a_list": Holder(gate=linear(3), gates=several(3)),
    "moe_in_a_name": named("AMoebaNet", gate=gate("Gate", 4), cells=several(4)),
}


@pytest.mark.parametrize("name", ZOO)
def test_nothing_else_is_taken_for_a_mixture_of_experts(name: str) -> None:
    for module in ZOO[name].modules():
        assert find_router_beside_experts(module) == []
    with pytest.raises(NoRoutersFound):
        moe_trace.find_routers(ZOO[name])
