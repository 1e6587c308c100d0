"""Tests that the handler writes a reduced file next to the trace on request, and never fails a run for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_trace
from moe_trace.read.reduced import workers


def record(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    counts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1, "vocab_size": 64}
    model = OlmoeForCausalLM(OlmoeConfig(**sizes, **counts, eos_token_id=1))
    handler = moe_trace.tensorboard_trace_handler(folder, use_gzip=True, reduce=True)
    with torch.no_grad(), moe_trace.profile(model, on_trace_ready=handler) as prof:
        model(torch.arange(8)[None])
        prof.step()
    (trace,) = folder.glob("*.pt.trace.json.gz")
    return trace


def test_what_is_reduced_at_export_answers_for_the_trace(tmp_path: Path) -> None:
    trace = record(tmp_path)
    with_trace = moe_trace.read_summary(trace)
    trace.unlink()
    without = moe_trace.read_summary(tmp_path)
    assert without.totals == with_trace.totals and without.phases == with_trace.phases
    assert any("gone" in note for note in without.notes)


def test_a_full_disk_costs_the_small_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(workers, "write_reduced", full)
    with pytest.warns(UserWarning, match="not reduced"):
        trace = record(tmp_path)
    assert moe_trace.read_summary(trace).totals.calls == 1
