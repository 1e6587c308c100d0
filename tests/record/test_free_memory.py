"""Tests that large recordings return freed memory when they are read, and that small ones skip this."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

import moe_trace
from models import tiny_olmoe, token_batch
from moe_trace.record.calls import free_memory, sparse_rows


@pytest.mark.parametrize(("many", "trimmed"), [(7, [0]), (8, [])])
def test_memory_is_given_back_where_many_counts_were_recorded(
    monkeypatch: pytest.MonkeyPatch, many: int, trimmed: list[int]
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(free_memory, "_MANY", many)
    monkeypatch.setattr(free_memory, "_trim", lambda: asked.append)
    model = tiny_olmoe(layers=1)  # of 8 experts
    with torch.no_grad(), moe_trace.MoETracer(model) as tracer:
        model(**token_batch(1, 4))
        assert asked == []  # never while the model runs
    assert len(tracer.samples()) == 1 and asked == trimmed


def test_large_counts_are_dense_again_in_pages_of_their_own() -> None:
    counts = np.zeros((3, sparse_rows._LARGE), dtype=np.int64)
    counts[0, 7], counts[2, 9] = 300, 2
    kept = sparse_rows.smallest(counts)
    assert isinstance(kept, sparse_rows.SparseRows)
    dense = kept.dense()
    assert np.array_equal(dense, counts) and isinstance(dense.base, mmap.mmap)
    row = dense[2].copy() + dense[2]  # writable, and alive as long as a row of it
    assert row.sum() == 4


def test_a_c_library_that_cannot_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory.ctypes, "CDLL", lambda name: object())
    free_memory._trim.cache_clear()
    free_memory.give_back_memory(2**40)
    assert free_memory._trim() is None
    free_memory._trim.cache_clear()
