"""DeepSpeed's `TopKGate` in its `MOELayer` and its `MoE`, on its own code and on one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from host_checks import (
    DIM,
    EXPERTS,
    Layers,
    computes_the_same,
    counts,
    in_traces,
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


@pytest.fixture
def one_rank(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `deepspeed.initialize` needs on one process, without its own collectives in C++."""
    ops = pytest.importorskip("deepspeed.ops")
    from deepspeed.comm import comm

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(ops.__compatible_ops__, "deepspeed_shm_comm", False)
    monkeypatch.setattr(comm, "cdb", None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_deepspeed_engine_under_a_profiler_writes_the_routing(one_rank: None, tmp_path: Any) -> None:
    """The training loop of its tutorial on the PyTorch profiler, with its engine and its `MoE`."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    limits = {"capacity_factor": 0.5, "min_capacity": 1, "use_rts": False}
    moes = (MoE(DIM, nn.Linear(DIM, DIM), num_experts=EXPERTS, k=2, **limits) for _ in range(3))
    model = randomised(Layers(moes))
    kept = [kept_by(moe.deepspeed_moe.gate) for moe in model.layers]
    adam = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        dist_init_required=False,
        config={"train_micro_batch_size_per_gpu": 1, "optimizer": adam},
    )
    with (
        moe_trace.MoETracer(model),
        torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=2),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(tmp_path / "out")),
            with_stack=True,
        ) as profiler,
    ):
        for _ in range(8):
            engine.backward(engine(torch.randn(1, 24, DIM)).square().mean())
            engine.step()
            profiler.step()
    assert engine.global_steps == 8
    assert in_traces(tmp_path / "out") == [
        [gate[step] for step in steps for gate in kept] for steps in ((2, 3), (6, 7))
    ]
