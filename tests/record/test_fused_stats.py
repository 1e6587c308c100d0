"""Tests that the fused kernels agree with `routing_stats`, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_trace.find.contracts import RouterOutput
from moe_trace.record.reduce.block_sizes import block_sizes
from moe_trace.record.reduce.kernel_cache import FusedKernels
from moe_trace.record.reduce.stats import FLOAT_FIELDS, routing_stats

triton = pytest.importorskip(
    "triton", reason="Triton is installed with torch for GPUs, and by the tests' extra"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, for logits of NaN


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    import moe_trace.record.reduce.triton_kernels

    return moe_trace.record.reduce.triton_kernels


class Calls:
    """L router calls of one shape, with all that can be odd about them."""

    def __init__(
        self, seed: int, calls: int, tokens: int, experts: int, top_k: int, classes: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        self.experts, self.classes = experts, classes
        self.logits = [(8 * random(tokens, classes) - 4).to(dtype) for _ in range(calls)]
        self.index = [(random(tokens, top_k) * (experts + 2)).long() - 1 for _ in range(calls)]
        self.weights = [random(tokens, top_k) * (random(tokens, top_k) > 0.2) for _ in range(calls)]
        self.padding = [random(tokens) > 0.5 for _ in range(calls)]
        if classes:
            self.logits[0][0, 0] = torch.nan
            self.logits[-1][-1, :] = -torch.inf
            if tokens > 3:
                self.logits[0][2, 0] = torch.inf
                self.logits[0][3, 1:] = -torch.inf  # certain: finite, and of no entropy

    def on(self, kind: list[Tensor]) -> list[Tensor]:
        return [tensor.to(DEVICE) for tensor in kind]


def compare(fused: ModuleType, calls: Calls) -> None:
    logits = calls.on(calls.logits) if calls.classes else None
    found = fused.fused_routing_stats(
        logits, calls.on(calls.weights), calls.on(calls.index), calls.experts, calls.on(calls.padding)
    )
    expected = routing_stats(
        torch.stack(calls.logits).double() if calls.classes else None,
        torch.stack(calls.weights),
        torch.stack(calls.index),
        calls.experts,
        torch.stack(calls.padding),
    )
    assert torch.equal(found.ints.cpu(), expected.ints)
    np.testing.assert_allclose(found.floats.cpu(), expected.floats, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    calls=st.integers(1, 4),
    tokens=st.integers(1, 90),
    experts=st.integers(2, 40),
    top_k=st.integers(1, 9),
    more_classes=st.sampled_from([0, 0, 0, 3, -1]),
    dtype=st.sampled_from(LOGIT_TYPES),
)
def test_figures_equal_those_of_the_operators_in_float64(
    fused: ModuleType,
    seed: int,
    calls: int,
    tokens: int,
    experts: int,
    top_k: int,
    more_classes: int,
    dtype: torch.dtype,
) -> None:
    compare(fused, Calls(seed, calls, tokens, experts, top_k, experts + more_classes, dtype))


def test_routers_without_logits(fused: ModuleType) -> None:
    compare(fused, Calls(0, calls=3, tokens=50, experts=8, top_k=2, classes=0, dtype=torch.float32))


def test_many_chunks_and_many_experts(fused: ModuleType) -> None:
    compare(fused, Calls(1, calls=2, tokens=150, experts=300, top_k=10, classes=300, dtype=torch.bfloat16))


def test_equal_inputs_give_equal_bits(fused: ModuleType) -> None:
    calls = Calls(2, calls=2, tokens=400, experts=16, top_k=4, classes=16, dtype=torch.float32)
    logits, weights, index = calls.on(calls.logits), calls.on(calls.weights), calls.on(calls.index)
    first, second = (fused.fused_routing_stats(logits, weights, index, 16, None) for _ in range(2))
    assert torch.equal(first.ints, second.ints)
    assert torch.equal(first.floats, second.floats)


def test_tensors_that_are_not_contiguous(fused: ModuleType) -> None:
    calls = Calls(3, calls=1, tokens=40, experts=8, top_k=2, classes=8, dtype=torch.float32)
    wide = [torch.cat([tensor, tensor], dim=-1)[:, : tensor.shape[-1]] for tensor in calls.logits]
    assert not wide[0].is_contiguous()
    calls.logits = wide
    compare(fused, calls)


def test_what_does_not_fit_is_told(fused: ModuleType) -> None:
    index, weights = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    assert fused.fits(torch.zeros(4, 8), weights, index)
    assert not fused.fits(torch.zeros(4, 8, dtype=torch.float64), weights, index)  # float64 stays float64
    assert not fused.fits(None, weights, index.short())
    assert not fused.fits(None, weights[:0], index[:0])
    assert block_sizes(64, 8, 64) == block_sizes(64, 8, 0)
    assert block_sizes(4096, 2, 4096) is None


@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_every_type_of_weights_and_ids(fused: ModuleType, weights: torch.dtype, index: torch.dtype) -> None:
    calls = Calls(5, calls=2, tokens=40, experts=8, top_k=3, classes=8, dtype=torch.float16)
    calls.weights = [tensor.to(weights) for tensor in calls.weights]
    calls.weights[0][0] = torch.tensor([-0.0, torch.nan, torch.finfo(weights).tiny])  # zero, and not zero
    calls.index = [tensor.to(index) for tensor in calls.index]
    compare(fused, calls)


@pytest.mark.cuda
def test_nothing_is_compiled_for_another_number_of_tokens_or_type(fused: ModuleType) -> None:
    """Triton compiles for arguments that are 1 or multiples of 16, unless it is told not to."""
    compare(fused, Calls(6, calls=2, tokens=5, experts=64, top_k=8, classes=64, dtype=torch.float32))
    compiled = sum(len(cache[0]) for cache in _caches(fused))
    for tokens, calls in ((1, 1), (16, 1), (33, 16), (2048, 3)):
        for dtype in LOGIT_TYPES:
            compare(fused, Calls(6, calls, tokens, experts=64, top_k=8, classes=64, dtype=dtype))
        compare(fused, Calls(6, calls, tokens, experts=64, top_k=8, classes=0, dtype=dtype))
    assert sum(len(cache[0]) for cache in _caches(fused)) == compiled > 0


def _caches(fused: ModuleType) -> list[Any]:
    kernels = (fused._sum_chunks, fused._add_chunks)
    return [cache for kernel in kernels for cache in kernel.device_caches.values()]


# -- when they are used ----------------------------------------------------------------------------------


def reading(calls: Calls) -> RouterOutput:
    return RouterOutput(
        calls.index[0].to(DEVICE),
        calls.weights[0].to(DEVICE),
        calls.on(calls.logits)[0] if calls.classes else None,
    )


def test_kernels_are_used_only_once_they_were_made_ready() -> None:
    kernels, device = FusedKernels(), torch.zeros(0, device=DEVICE).device
    calls = Calls(7, calls=1, tokens=20, experts=8, top_k=2, classes=8, dtype=torch.bfloat16)
    assert kernels.ready_for(reading(calls), 8) is None
    kernels.prepare(device, num_experts=8, top_k=2)
    assert kernels.ready_for(reading(calls), 8) is not None
    calls.logits = [tensor.double() for tensor in calls.logits]
    assert kernels.ready_for(reading(calls), 8) is None, "a type that they do not know"
    more = Calls(7, calls=1, tokens=20, experts=40, top_k=2, classes=40, dtype=torch.bfloat16)
    assert kernels.ready_for(reading(more), 40) is None, "of other blocks, which would be compiled in a step"


def test_failures_on_one_device_are_bounded_and_leave_others_alone() -> None:
    kernels, device = FusedKernels(), torch.zeros(0, device=DEVICE).device
    other = torch.device("cuda", 7)
    calls = Calls(8, calls=1, tokens=20, experts=8, top_k=2, classes=8, dtype=torch.bfloat16)
    kernels.prepare(device, num_experts=8, top_k=2)
    with pytest.warns(RuntimeWarning, match=r"do not run on cuda:7.*RuntimeError: no compiler"):
        for _ in range(5):
            kernels.failed(other, RuntimeError("no compiler"))
    assert kernels.ready_for(reading(calls), 8) is not None
    with pytest.warns(RuntimeWarning, match="do not run on"):
        kernels.failed(device, RuntimeError("launch failed"))
    assert kernels.ready_for(reading(calls), 8) is not None, "one failure may be an accident"
    for _ in range(2):
        kernels.failed(device, RuntimeError("launch failed"))
    kernels.prepare(device, num_experts=8, top_k=2)
    assert kernels.ready_for(reading(calls), 8) is None


def test_the_comparison_can_fail(fused: ModuleType) -> None:
    calls = Calls(4, calls=1, tokens=20, experts=8, top_k=2, classes=8, dtype=torch.float32)
    found = fused.fused_routing_stats(
        calls.on(calls.logits), calls.on(calls.weights), calls.on(calls.index), 8, None
    )
    other = torch.stack(calls.index).roll(1, dims=-1).clamp(0, 6)
    expected = routing_stats(torch.stack(calls.logits), torch.stack(calls.weights), other, 8, None)
    assert not torch.equal(found.ints.cpu(), expected.ints)
    assert found.floats.shape[-1] == len(FLOAT_FIELDS)
