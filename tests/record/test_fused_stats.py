"""The fused kernels give the figures of `routing_stats`: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_trace.record.reduce.stats import FLOAT_FIELDS, routing_stats

triton = pytest.importorskip(
    "triton", reason="Triton is installed with torch for GPUs, and by the tests' extra"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, for logits of NaN


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    import moe_trace.record.reduce.fused_stats

    return moe_trace.record.reduce.fused_stats


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
    assert fused.fits(torch.zeros(4, 8), weights, index, 8)
    assert not fused.fits(torch.zeros(4, 8, dtype=torch.float64), weights, index, 8)  # float64 stays float64
    assert not fused.fits(torch.zeros(4, 4096), weights, index, 4096)
    assert not fused.fits(None, weights[:0], index[:0], 8)


def test_the_comparison_can_fail(fused: ModuleType) -> None:
    calls = Calls(4, calls=1, tokens=20, experts=8, top_k=2, classes=8, dtype=torch.float32)
    found = fused.fused_routing_stats(
        calls.on(calls.logits), calls.on(calls.weights), calls.on(calls.index), 8, None
    )
    other = torch.stack(calls.index).roll(1, dims=-1).clamp(0, 6)
    expected = routing_stats(torch.stack(calls.logits), torch.stack(calls.weights), other, 8, None)
    assert not torch.equal(found.ints.cpu(), expected.ints)
    assert found.floats.shape[-1] == len(FLOAT_FIELDS)
