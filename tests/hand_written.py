"""Hand-written mixtures of experts. Each keeps the tokens that each expert received in `truth`.

They share no code, like those on GitHub. A tracer can only rely on what they have in common.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DIM, EXPERTS, TOP_K = 16, 4, 2


def ffn(width: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, width), nn.GELU(), nn.Linear(width, DIM))


def counted(index: Tensor, experts: int = EXPERTS) -> list[int]:
    return torch.bincount(index.flatten(), minlength=experts).tolist()


class MoE(nn.Module):
    """Counts what each of its blocks did last."""

    truth: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate: Any = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts: Any = nn.ModuleList(ffn() for _ in range(EXPERTS))

    def loop(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Mixtral's loop: every expert is handed the rows of its tokens."""
        flat = x.reshape(-1, DIM)
        out = torch.zeros_like(flat)
        self.truth = counted(index)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(x)


class Mixtral(MoE):
    def forward(self, x: Tensor) -> Any:
        logits = self.gate(x.view(-1, DIM))
        weights, index = logits.softmax(-1, dtype=torch.float).topk(self.top_k)
        return self.loop(x, weights / weights.sum(-1, keepdim=True), index), logits


class MixtralOnlyHit(MoE):
    """Experts that nobody chose are not called."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(2)
        self.truth, out = counted(index), torch.zeros_like(flat)
        chosen = index.T
        for e in index.unique().tolist():
            slot, token = torch.where(chosen == e)
            out[token] += self.experts[e](flat[None, token].reshape(-1, DIM)) * weights[token, slot, None]
        return out.view_as(x)


class NanoMoE(MoE):
    """A top-k that nobody but the code knows."""

    def __init__(self) -> None:
        super().__init__()
        del self.top_k

    def forward(self, x: Tensor) -> Tensor:
        top, index = torch.topk(self.gate(x), 2, dim=-1)
        return self.loop(x, F.softmax(top, dim=-1).view(-1, 2), index.view(-1, 2))


class TopOne(MoE):
    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x.view(-1, DIM)).softmax(-1).max(-1)
        self.top_k = 1
        return self.loop(x, weight[:, None], index[:, None])


class BySlot(MoE):
    """Each expert is called once a slot; tokens one at a time in chunks."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        weights, index = self.gate(flat).sigmoid().topk(TOP_K)
        self.truth, out = counted(index), torch.zeros_like(flat)
        for k in range(TOP_K):
            for e in range(EXPERTS):
                for token in (index[:, k] == e).nonzero().flatten().split(3):
                    out[token] += weights[token, k, None] * self.experts[e](flat[token])
        return out.view_as(x)


class TokenByToken(MoE):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(TOP_K)
        self.truth = counted(index)
        rows = [
            sum(weights[t, k] * self.experts[int(index[t, k])](flat[t]) for k in range(TOP_K))
            for t in range(len(flat))
        ]
        return torch.stack(rows).view_as(x)  # type: ignore[arg-type]


class ByKeyword(MoE):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{e}": Keyworded() for e in range(EXPERTS)})
        self.router = self.gate
        del self.gate

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.view(-1, DIM)
        weights, index = self.router(flat).softmax(-1).topk(TOP_K)
        self.truth, out = counted(index), torch.zeros_like(flat)
        for e in range(EXPERTS):
            token, slot = torch.where(index == e)
            out[token] += weights[token, slot, None] * self.experts[f"expert_{e}"](hidden_states=flat[token])
        return out.view_as(hidden_states)


class Keyworded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 8), nn.Linear(8, DIM)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(self.up(hidden_states).relu())


class ExpertsInsideAModule(MoE):
    """The list stands in a module of its own, which is handed the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Bank()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(TOP_K)
        self.truth = counted(index)
        return self.experts(flat, weights, index).view_as(x)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(ffn() for _ in range(EXPERTS))

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, mlp(x[token]) * weights[token, slot, None])
        return out


class StackedExperts(MoE):
    """einops' and einsum's way: the weights are one tensor, indexed by the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Stacked()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(TOP_K)
        self.truth = counted(index)
        return self.experts(flat, index, weights).view_as(x)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, DIM, 8))
        self.w2 = nn.Parameter(torch.randn(EXPERTS, 8, DIM))

    def forward(self, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        hidden = torch.einsum("td,tkdf->tkf", x, self.w1[chosen]).relu()
        return torch.einsum("tkf,tkfd,tk->td", hidden, self.w2[chosen], scores)


class SharedAndRouted(MoE):
    """DeepSeekMoE: experts that work on every token beside the routed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = nn.ModuleList([ffn(), ffn()])
        self.shared_expert_gate = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x.view(-1, DIM)).softmax(-1).topk(TOP_K)
        shared = sum(expert(x) for expert in self.shared_experts)
        return self.loop(x, weights, index) + self.shared_expert_gate(x).sigmoid() * shared


class ResidualMoE(MoE):
    """DeepSpeed's residual MoE: a dense network beside the experts, and a coefficient of both."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.coefficient = ffn(), nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x.view(-1, DIM)).softmax(-1).topk(TOP_K)
        dense, routed = self.coefficient(x).softmax(-1).unbind(-1)
        return dense[..., None] * self.mlp(x) + routed[..., None] * self.loop(x, weights, index)


class BiasedSigmoid(MoE):
    """DeepSeek-V3 without a router class: a bias that only chooses, and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tensor([2.0, 0.0, -1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x.view(-1, DIM)).sigmoid()
        biased = scores + self.bias
        groups = biased.view(-1, 2, EXPERTS // 2)
        best = groups.sum(-1).argmax(-1)
        keep = F.one_hot(best, 2).bool().repeat_interleave(EXPERTS // 2, -1)
        index = biased.masked_fill(~keep, -torch.inf).topk(TOP_K).indices
        return self.loop(x, scores.gather(1, index), index)


class NoisyTopK(MoE):
    """Shazeer 2017: the noise of its own layer decides."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_gate = nn.Linear(DIM, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        clean = self.gate(flat)
        noisy = clean + torch.randn_like(clean) * F.softplus(self.noise_gate(flat))
        top, index = noisy.topk(TOP_K)
        return self.loop(x, top.softmax(-1), index)


class NoisyTopKRouter(nn.Module):
    """makeMoE's: sparse weights of all experts, and the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.topkroute_linear, self.noise_linear = nn.Linear(DIM, EXPERTS), nn.Linear(DIM, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.topkroute_linear(x)
        noisy = logits + torch.randn_like(logits) * F.softplus(self.noise_linear(x))
        top, index = noisy.topk(TOP_K)
        sparse = torch.full_like(noisy, -torch.inf).scatter(-1, index, top)
        return sparse.softmax(-1), index


class SparseMoE(MoE):
    """makeMoE."""

    def __init__(self) -> None:
        super().__init__()
        self.router = NoisyTopKRouter()
        del self.gate

    def forward(self, x: Tensor) -> Tensor:
        gating, index = self.router(x)
        self.truth, out = counted(index), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (index == e).any(-1)
            if mask.any():
                out[mask] += gating[mask][:, e, None] * expert(x[mask])
        return out


class SwitchWithCapacity(MoE):
    """Tokens beyond an expert's capacity go past it."""

    def __init__(self) -> None:
        super().__init__()
        self.switch, self.top_k = self.gate, 1
        del self.gate

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        weight, index = self.switch(flat).softmax(-1).max(-1)
        capacity, out = max(1, math.ceil(len(flat) / EXPERTS)), flat.clone()
        self.truth = [0] * EXPERTS
        for e, expert in enumerate(self.experts):
            token = (index == e).nonzero().flatten()[:capacity]
            self.truth[e] = len(token)
            out[token] = expert(flat[token]) * weight[token, None]
        return out.view_as(x)


class TopOneIds(MoE):
    """labml's Switch: a router that returns one id a token."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.top_k = OneIdRouter(), 1
        del self.gate

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x.view(-1, DIM))
        return self.loop(x, weight[:, None], index[:, None])


class OneIdRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = self.proj(x).softmax(-1).max(-1)
        return weight, index


class SequentialGate(MoE):
    """A gate of two layers and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, EXPERTS), nn.Softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x.view(-1, DIM)).topk(TOP_K)
        return self.loop(x, weights, index)


class ScoresGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(DIM, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x).softmax(-1)


class GateOfItsOwnClass(MoE):
    """A gate that is a class and returns its softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = ScoresGate()

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x.view(-1, DIM)).topk(TOP_K)
        return self.loop(x, weights, index)


class NewGate(nn.Module):
    """MiniMind's and DeepSeek's: ids first."""

    def __init__(self) -> None:
        super().__init__()
        self.n_routed_experts, self.top_k = EXPERTS, TOP_K
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        scores = F.linear(x.view(-1, DIM), self.weight).softmax(-1)
        weights, index = scores.topk(self.top_k)
        return index, weights, scores.mean() * 0


class MiniMind(MoE):
    """Training repeats each token K times; inference sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = NewGate()

    def forward(self, x: Tensor) -> Tensor:
        index, weights, _ = self.gate(x)
        flat, chosen = x.view(-1, DIM), index.view(-1)
        self.truth = counted(index)
        if self.training:
            repeated = flat.repeat_interleave(TOP_K, 0)
            parts = torch.empty_like(repeated)
            for e, expert in enumerate(self.experts):
                parts[chosen == e] = expert(repeated[chosen == e])
            return (parts.view(-1, TOP_K, DIM) * weights[..., None]).sum(1).view_as(x)
        order, ends = chosen.argsort(), torch.bincount(chosen, minlength=EXPERTS).cumsum(0).tolist()
        out, start = torch.zeros_like(flat), 0
        for e, end in enumerate(ends):
            token = order[start:end] // TOP_K
            if end > start:
                out.index_add_(
                    0, token, self.experts[e](flat[token]) * weights.view(-1)[order[start:end], None]
                )
            start = end
        return out.view_as(x)


class DropsAfterTheRouter(MiniMind):
    """The router names ids; a capacity in the block drops some of them afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        index, weights, _ = self.gate(x)
        flat, out = x.view(-1, DIM), torch.zeros_like(x.view(-1, DIM))
        self.truth = [0] * EXPERTS
        for e, expert in enumerate(self.experts):
            token, slot = (index == e).nonzero(as_tuple=True)
            token, slot = token[:5], slot[:5]
            self.truth[e] = len(token)
            out[token] += weights[token, slot, None] * expert(flat[token])
        return out.view_as(x)


class MaskedAfterwards(MiniMind):
    """Every expert computes every token; the router's ids say which of them count."""

    def forward(self, x: Tensor) -> Tensor:
        index, weights, _ = self.gate(x)
        self.truth = counted(index)
        sparse = (
            weights.new_zeros(len(index), EXPERTS).scatter(1, index, weights).view(*x.shape[:-1], EXPERTS)
        )
        return sum(sparse[..., e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore


class CheckpointsEachExpert(MoE):
    """Experts run again in the backward, without their gate."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Recomputed() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x.view(-1, DIM)).softmax(-1).topk(TOP_K)
        return self.loop(x, weights, index)


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = ffn()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.ffn, x, use_reentrant=False)  # type: ignore[no-any-return]


class ComputesOneExpertElsewhere(MiniMind):
    """A hot expert runs fused, so that its module is never called."""

    def forward(self, x: Tensor) -> Tensor:
        index, weights, _ = self.gate(x)
        flat, out = x.view(-1, DIM), torch.zeros_like(x.view(-1, DIM))
        self.truth = counted(index)
        for e, expert in enumerate(self.experts):
            token, slot = (index == e).nonzero(as_tuple=True)
            rows = (
                F.linear(flat[token], expert[0].weight).sum(-1, keepdim=True)
                if e == 1
                else expert(flat[token])
            )
            out[token] += weights[token, slot, None] * rows
        return out.view_as(x)


# -- what no structure tells: refused, or not found -----------------------------------------------------


class SoftGating(MoE):
    """Every expert computes every token."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        self.truth = [weights[..., 0].numel()] * EXPERTS
        return torch.stack([expert(x) for expert in self.experts], -1).mul(weights[..., None, :]).sum(-1)


class SoftGatingOfTwo(SoftGating):
    """... with a top-k in its configuration that it does not use."""

    top_k = TOP_K


class MaskedDense(MoE):
    """Top-k as a mask after experts that compute every token."""

    def forward(self, x: Tensor) -> Tensor:
        top, index = self.gate(x).topk(TOP_K)
        sparse = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, index, top.softmax(-1))
        self.truth, out = counted(index), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (index == e).any():
                out = out + sparse[..., e, None] * expert(x)
        return out


class GShard(MoE):
    """einsum dispatch to places of a capacity; what is empty is computed too."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        weights = self.gate(flat).softmax(-1)
        index = weights.argmax(-1)
        self.top_k = 1
        capacity = max(1, math.ceil(self.factor * len(flat) / EXPERTS))
        chosen = F.one_hot(index, EXPERTS)
        place = (chosen.cumsum(0) - 1) * chosen
        kept = chosen * (place < capacity)
        self.truth = kept.sum(0).tolist()
        dispatch = kept[..., None] * F.one_hot(place.clamp(max=capacity - 1), capacity)
        rows = torch.einsum("tec,td->ecd", dispatch.float(), flat)
        out = torch.stack([expert(rows[e]) for e, expert in enumerate(self.experts)])
        return torch.einsum("tec,ecd,te->td", dispatch.float(), out, weights).view_as(x)


class GShardWithRoom(GShard):
    factor = 1.5


class ExpertChoice(MoE):
    """Zhou 2022: experts choose tokens."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, DIM)
        capacity = max(1, len(flat) * TOP_K // EXPERTS)
        weights, token = self.gate(flat).softmax(-1).topk(capacity, dim=0)
        self.truth, out = [capacity] * EXPERTS, torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, token[:, e], expert(flat[token[:, e]]) * weights[:, e, None])
        return out.view_as(x)


class GateIsAParameter(MoE):
    def __init__(self) -> None:
        super().__init__()
        del self.gate
        self.w_gate = nn.Parameter(torch.randn(DIM, EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = (x.view(-1, DIM) @ self.w_gate).softmax(-1).topk(TOP_K)
        return self.loop(x, weights, index)


class GateIsNotCalled(MoE):
    """Only the gate's weight is used."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = F.linear(x.view(-1, DIM), self.gate.weight).softmax(-1).topk(TOP_K)
        return self.loop(x, weights, index)


class ExpertsAreNotCalled(MoE):
    """A fused kernel, here of stacked weights, stands for the list."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x.view(-1, DIM)).softmax(-1).topk(TOP_K)
        self.truth = counted(index)
        stacked = torch.stack([expert[0].weight for expert in self.experts])
        hidden = torch.einsum("td,tkfd->tkf", x.view(-1, DIM), stacked[index])
        return (hidden * weights[..., None]).sum(1)


class MultiGate(MoE):
    """MMoE: a gate for each of two tasks over the same experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(DIM, EXPERTS) for _ in range(2))
        del self.gate

    def forward(self, x: Tensor) -> Tensor:
        out = torch.stack([expert(x) for expert in self.experts], -1)
        self.truth = [x[..., 0].numel()] * EXPERTS
        return sum((out * gate(x).softmax(-1)[..., None, :]).sum(-1) for gate in self.gates)  # type: ignore


class TwoGates(MoE):
    def __init__(self) -> None:
        super().__init__()
        self.text_gate, self.image_gate = self.gate, nn.Linear(DIM, EXPERTS)
        del self.gate

    def forward(self, x: Tensor) -> Tensor:
        logits = self.text_gate(x.view(-1, DIM)) + self.image_gate(x.view(-1, DIM))
        weights, index = logits.softmax(-1).topk(TOP_K)
        return self.loop(x, weights, index)


class OfWholeSentences(MoE):
    """One decision a sentence, whose tokens all go there."""

    def forward(self, x: Tensor) -> Tensor:
        index = self.gate(x.mean(1)).argmax(-1)
        self.top_k, self.truth = 1, [0] * EXPERTS
        out = torch.empty_like(x)
        for b, e in enumerate(index.tolist()):
            out[b] = self.experts[e](x[b])
            self.truth[e] += x.shape[1]
        return out


class NestedGroups(MoE):
    """Groups of experts, and a gate for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.outer_gate, self.inner_gate = nn.Linear(DIM, 2), nn.Linear(DIM, 2)
        self.experts = nn.ModuleList(nn.ModuleList([ffn(), ffn()]) for _ in range(2))
        del self.gate

    def forward(self, x: Tensor) -> Tensor:
        flat, self.truth = x.view(-1, DIM), [0] * EXPERTS
        outer, inner = self.outer_gate(flat).argmax(-1), self.inner_gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for o in range(2):
            for i in range(2):
                token = ((outer == o) & (inner == i)).nonzero().flatten()
                self.truth[2 * o + i] = len(token)
                out[token] = self.experts[o][i](flat[token])
        return out.view_as(x)


COUNTED = [
    *(Mixtral, MixtralOnlyHit, NanoMoE, TopOne, BySlot, TokenByToken, ByKeyword, ExpertsInsideAModule),
    *(StackedExperts, SharedAndRouted, ResidualMoE, BiasedSigmoid, NoisyTopK, SparseMoE, SwitchWithCapacity),
    *(TopOneIds, SequentialGate, GateOfItsOwnClass, MiniMind, DropsAfterTheRouter, MaskedAfterwards),
    *(CheckpointsEachExpert, ComputesOneExpertElsewhere),
]
REFUSED = [
    *(SoftGating, SoftGatingOfTwo, MaskedDense, GShard, GShardWithRoom, ExpertChoice, GateIsNotCalled),
    *(ExpertsAreNotCalled, OfWholeSentences),
]
NOT_FOUND = [GateIsAParameter, MultiGate, TwoGates, NestedGroups]
