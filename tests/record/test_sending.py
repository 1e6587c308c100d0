"""Tests that tokens are sliced like `torch.chunk`, and their slots counted without waiting for the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_trace
from moe_trace.find.device_mesh import chunk
from moe_trace.record.parallel.dispatch import DispatchInfo, append_sent_counts, sent_counts

EXPERTS = 7


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunks_are_those_of_torch(size: int, parts: int) -> None:
    pieces = list(torch.arange(size).chunk(parts)) if size else []
    ours = [range(*chunk(size, parts, part)) for part in range(parts)]
    assert [list(piece) for piece in ours if piece] == [piece.tolist() for piece in pieces]
    assert [n for piece in ours for n in piece] == list(range(size))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_sent_slots_are_counted_by_expert(data: st.DataObject) -> None:
    calls, tokens, k = (data.draw(st.integers(1, n)) for n in (3, 9, 4))
    start = data.draw(st.integers(0, tokens))
    stop = data.draw(st.integers(start, tokens))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    index = [torch.randint(-1, EXPERTS + 2, (tokens, k), generator=generator) for _ in range(calls)]
    ints = torch.arange(3).repeat(calls, 1)
    sending = DispatchInfo(64, (start, stop))
    packed = append_sent_counts(ints, sending, index, EXPERTS).numpy()
    assert packed[:, :3].tolist() == ints.tolist()
    for row, slots in zip(packed, index, strict=True):
        inside = slots[start:stop].flatten()
        inside = inside[(inside >= 0) & (inside < EXPERTS)]
        counted = sent_counts(row, sending, EXPERTS)
        assert counted is not None
        assert counted.tolist() == np.bincount(inside, minlength=EXPERTS).tolist()


def test_calls_that_dispatch_all_of_their_tokens_need_no_count() -> None:
    ints = torch.zeros(2, 5, dtype=torch.int64)
    for sending in (None, DispatchInfo(64)):
        assert append_sent_counts(ints, sending, [torch.zeros(3, 2)] * 2, EXPERTS) is ints
        assert sent_counts(ints[0].numpy(), sending, EXPERTS) is None


@pytest.mark.cuda
def test_counting_does_not_wait_for_the_device() -> None:
    index: list[Tensor] = [torch.randint(0, EXPERTS, (30, 4), device="cuda") for _ in range(3)]
    ints = torch.zeros(3, 5, dtype=torch.int64, device="cuda")
    append_sent_counts(ints, DispatchInfo(64, (0, 15)), index, EXPERTS)  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = append_sent_counts(ints, DispatchInfo(64, (0, 15)), index, EXPERTS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for row, slots in zip(packed.cpu(), index, strict=True):
        assert row[5:].tolist() == torch.bincount(slots[:15].flatten().cpu(), minlength=EXPERTS).tolist()


def test_layers_spread_by_a_device_map_are_recorded(tmp_path: Path) -> None:
    """One CPU cannot be two GPUs: half of the layers wait on the disk, so that the same hooks move them."""
    pytest.importorskip("accelerate")
    from moe_trace.demo import load_demo_model

    alone, _ = load_demo_model()
    where = {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    where |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    spread = type(alone).from_pretrained(
        alone.config.name_or_path, dtype=torch.float32, device_map=where, offload_folder=tmp_path
    )
    ids = torch.arange(3, 120).reshape(3, -1)
    counts = []
    for model in (alone, spread):
        with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
            logits = model(input_ids=ids).logits
        counts.append([s.assignments.tolist() for s in tracer.samples()])
        assert tracer.recording().parallel is None
    assert counts[0] == counts[1]
    with torch.no_grad():
        assert torch.equal(logits, spread(input_ids=ids).logits)
