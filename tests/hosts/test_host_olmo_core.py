"""OLMo-core's routers, on its own code; its experts need Triton."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_checks import (
    DIM,
    EXPERTS,
    TOP_K,
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


def olmo_core_router(version: int) -> Any:
    pytest.importorskip("olmo_core")
    if version == 1:
        from olmo_core.nn.moe.router import MoELinearRouter

        return randomised(MoELinearRouter(d_model=DIM, num_experts=EXPERTS, top_k=TOP_K))
    v2 = pytest.importorskip("olmo_core.nn.moe.v2.router", exc_type=ImportError)  # needs TransformerEngine
    return randomised(v2.MoERouterV2(d_model=DIM, num_experts=EXPERTS, top_k=TOP_K))


class OlmoCoreBlock(nn.Module):
    """OLMo-core's own router; its experts need Triton, so these only take what its block hands them."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, _Experts()

    def forward(self, x: Tensor) -> Tensor:
        out = self.router(x) if not hasattr(self.router, "orth_loss_weight") else self.router(x, False)
        weights, index, sizes = out[:3]
        flat = x.view(-1, DIM)
        return self.experts(flat, weights.flatten(0, -2), index.flatten(0, -2), sizes).view_as(x)


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / 8)
        self.received: list[list[int]] = []

    def forward(self, x: Tensor, weights: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
        self.received.append(sizes.int().tolist())
        return torch.einsum("td,tkde,tk->te", x, self.w[index], weights)


@pytest.mark.parametrize("version", [1, 2])
def test_olmo_core_equals_its_own_counts(version: int) -> None:
    block = OlmoCoreBlock(olmo_core_router(version)).eval()
    (sample,) = recorded(block, lambda: block(torch.randn(2, 5, DIM)))
    assert [counts(sample)] == block.experts.received
    computes_the_same(block, lambda: block(torch.ones(2, 5, DIM)))


@pytest.mark.parametrize("version", [1, 2])
def test_olmo_core_layers_recompute_and_are_reported(version: int, tmp_path: Any, capsys: Any) -> None:
    model = Layers(OlmoCoreBlock(olmo_core_router(version)) for _ in range(3)).train()
    x = torch.randn(2, 5, DIM)
    recomputes_the_same(model, x)
    report_shows_every_layer(model, lambda: model(x), tmp_path, capsys)


@pytest.mark.parametrize("version", [1, 2])
def test_olmo_core_counts_in_training_and_uniform_assignment(version: int) -> None:
    router = olmo_core_router(version)
    router.uniform_expert_assignment = True
    block = OlmoCoreBlock(router).train()
    (sample,) = recorded(block, lambda: block(torch.randn(2, 8, DIM)))
    assert [counts(sample)] == block.experts.received == [[4] * EXPERTS]


def test_olmo_core_noise_decides_and_is_counted() -> None:
    router = olmo_core_router(1)
    router.jitter_eps = 0.5
    block = OlmoCoreBlock(router).train()
    x = torch.randn(2, 50, DIM)
    samples = recorded(block, lambda: [block(x) for _ in range(4)])
    found = [counts(sample) for sample in samples]
    assert found == block.experts.received and len(set(map(tuple, found))) > 1
    load = router.batch_size_per_expert
    assert torch.as_tensor(found).sum(0).tolist() == load.int().tolist()


def test_olmo_core_profiler_callback_writes_the_routing(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("olmo_core.train.callbacks.profiler")
    model = Layers(OlmoCoreBlock(olmo_core_router(1)) for _ in range(3))
    callback = callbacks.ProfilerCallback(wait=1, warmup=1, active=2, with_stack=False)
    callback._trainer = SimpleNamespace(
        work_dir=tmp_path, device=torch.device("cpu"), persist_working_file=lambda path: path
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with moe_trace.MoETracer(model):
            callback.pre_train()
            for _ in range(6):
                callback.pre_load_batch()
                model(torch.randn(2, 5, DIM))
            callback._exit_stack.close()
    finally:
        torch.distributed.destroy_process_group()
        logging.getLogger("olmo_core").setLevel(logging.WARNING)
    received = [block.experts.received for block in model.layers]
    (trace,) = in_traces(tmp_path / "profiler")
    assert trace == [sizes[step] for step in (2, 3) for sizes in received]
