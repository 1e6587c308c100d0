"""DeepSpeed's `TopKGate` in its `MOELayer` and its `MoE`, on its own code and on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_checks import (
    DIM,
    EXPERTS,
    Layers,
    computes_the_same,
    counts,
    randomised,
    recomputes_the_same,
    recorded,
    report_shows_every_layer,
)
from torch import Tensor, nn

import moe_trace


def deepspeed_layer(top_k: int, capacity: float = 0.5, **options: Any) -> Any:
    pytest.importorskip("deepspeed")
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    gate = TopKGate(
        *(DIM, EXPERTS),
        **{"k": top_k, "capacity_factor": capacity, "eval_capacity_factor": capacity, "min_capacity": 1},
        **options,
    )
    return randomised(MOELayer(gate, Experts(nn.Linear(DIM, DIM), EXPERTS), "ep", 1, EXPERTS))


def called(layer: Any, x: Tensor) -> Tensor:
    return layer(x, None)


def kept_by(gate: nn.Module) -> list[list[int]]:
    """What each call of a gate kept, by its routes or its mask."""
    kept: list[list[int]] = []

    def look(module: nn.Module, args: Any, out: Any) -> None:
        if len(out) == 7:
            index = out[3]
            kept.append(torch.bincount(index[index >= 0].long(), minlength=EXPERTS).tolist())
        else:
            kept.append(out[2].flatten(2).any(-1).sum(0).tolist())

    gate.register_forward_hook(look)
    return kept


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_deepspeed_counts_what_capacity_kept(top_k: int, training: bool) -> None:
    layer = deepspeed_layer(top_k, use_rts=False).train(training)
    kept = kept_by(layer.gate)
    samples = recorded(layer, lambda: [called(layer, torch.randn(1, 24, DIM)) for _ in range(3)])
    assert [counts(sample) for sample in samples] == kept
    assert all(sum(counts(s)) + s.skipped == 24 * top_k and s.skipped for s in samples)


@pytest.mark.parametrize("noise", ["RSample", "Jitter"])
@pytest.mark.parametrize("capacity", [0.5, 4.0])
def test_deepspeed_noise_decides_and_is_counted(noise: str, capacity: float) -> None:
    layer = deepspeed_layer(1, capacity, noisy_gate_policy=noise).train()
    kept, x = kept_by(layer.gate), torch.randn(1, 60, DIM)
    samples = recorded(layer, lambda: [called(layer, x) for _ in range(4)])
    assert [counts(sample) for sample in samples] == kept


def test_deepspeed_masks_give_what_its_routes_give() -> None:
    """The other of the gate's two forms: a combine mask [T, E, C]."""
    layer = deepspeed_layer(2)
    block = Masked(layer.gate).eval()
    kept = kept_by(layer.gate)
    (sample,) = recorded(block, lambda: block(torch.randn(24, DIM)))
    assert [counts(sample)] == kept and sample.skipped > 0


class Masked(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = gate, nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        _, combine, dispatch, _ = self.gate(x)
        places = torch.einsum("tec,td->ecd", dispatch.float(), x)
        out = torch.stack([expert(places[e]) for e, expert in enumerate(self.experts)])
        return torch.einsum("tec,ecd->td", combine, out)


@pytest.mark.parametrize("top_k", [1, 2])
def test_deepspeed_layers_train_recompute_and_are_reported(top_k: int, tmp_path: Any, capsys: Any) -> None:
    model = Layers((deepspeed_layer(top_k, use_rts=False) for _ in range(3)), called).train()
    x = torch.randn(1, 24, DIM)
    computes_the_same(model, lambda: model(x))
    if top_k == 1:  # its top-2 draws noise that a recomputation draws again
        recomputes_the_same(model, x)
    report_shows_every_layer(model, lambda: model(x), tmp_path, capsys)


def test_deepspeed_flops_are_those_of_the_experts() -> None:
    layer = deepspeed_layer(2)
    (site,) = moe_trace.find_routers(layer)
    assert site.info.expert_flops_per_slot == 2 * DIM * DIM
    assert site.info.router_flops_per_token == 2 * DIM * EXPERTS
