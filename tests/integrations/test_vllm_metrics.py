"""Tests of the metrics of a serving run: values against a count by hand, the file, and `/metrics`.

These use a model of transformers; tests/vllm_engine uses vLLM's engine and server.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compiled_models import small_model
from models import tiny_olmoe, token_batch
from moe_trace.integrations.vllm.metrics import MetricsWriter, start_metrics, wanted, window
from moe_trace.integrations.vllm.metrics_page import FileCollector, last_lines
from moe_trace.record.tracer import MoETracer
from paths import ROOT


def test_a_window_is_all_its_calls_together() -> None:
    """Against the samples, one by one; a layer with few assignments does not say who is dead."""
    model = tiny_olmoe(layers=2, experts=8, top_k=2)
    with torch.no_grad(), MoETracer(model) as tracer:
        for length in (50, 1, 3):
            model(**token_batch(2, length))
    samples = tracer.samples()
    found = window(samples)
    assert (found["tokens"], found["forwards"]) == (108, 3)
    assert len(found["layers"]) == 2
    for site, figures in found["layers"].items():
        own = [s.assignments for s in samples if s.site == site]
        load = np.sum(own, axis=0)
        assert figures["load_max_over_mean"] == pytest.approx(load.max() / load.mean(), abs=1e-4)
        used = statistics.mean(int((one > 0).sum()) for one in own)
        assert figures["distinct_experts"] == pytest.approx(used, abs=1e-4)
        assert figures["dead_experts"] == int((load == 0).sum())
    few = window([s for s in samples if s.tokens == 2])
    assert {figures["dead_experts"] for figures in few["layers"].values()} == {None}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_compiled_code_wrote_outside_steps_is_in_no_window(tmp_path: Path) -> None:
    """Rings are shipped without waiting: what is on its way belongs to the runs that are dropped, too."""
    path, model = tmp_path / "m.jsonl", small_model()
    with torch.no_grad(), MoETracer(model) as tracer:
        compiled = torch.compile(model, backend="eager")
        writer = MetricsWriter(tracer, path, rank=0, seconds=1e9)
        compiled(**token_batch(1, 12))
        writer.forget()  # warm-up
        compiled(**token_batch(1, 5))
        writer.keep()
        compiled(**token_batch(1, 7))
        writer.forget()  # a dummy batch between steps
        compiled(**token_batch(1, 4))
        writer.close()
    (line,) = lines_of(path)
    assert (line["tokens"], line["forwards"]) == (9, 2)


def test_each_window_is_a_line_and_totals_go_on(tmp_path: Path) -> None:
    path, model = tmp_path / "m.jsonl", tiny_olmoe(layers=2)
    with torch.no_grad(), MoETracer(model) as tracer:
        writer = MetricsWriter(tracer, path, rank=3, seconds=0)
        model(**token_batch(1, 9))
        writer.forget()  # a run of random tokens
        model(**token_batch(1, 5))
        writer.step()
        model(**token_batch(1, 4))
        writer.keep()
        model(**token_batch(1, 7))
        writer.forget()
        writer.close()
    lines = lines_of(path)
    assert [(line["tokens"], line["tokens_total"]) for line in lines] == [(5, 5), (4, 9)]
    assert [line["forwards_total"] for line in lines] == [1, 2]
    assert {line["rank"] for line in lines} == {3}


def test_a_window_that_is_not_over_is_not_written(tmp_path: Path) -> None:
    path, model = tmp_path / "m.jsonl", tiny_olmoe(layers=2)
    with torch.no_grad(), MoETracer(model) as tracer:
        writer = MetricsWriter(tracer, path, rank=0, seconds=1000)
        for _ in range(3):
            model(**token_batch(1, 5))
            writer.step()
        assert not path.exists()
        writer.close()
    (line,) = lines_of(path)
    assert (line["tokens"], line["forwards"]) == (15, 3)


def test_a_path_that_cannot_be_written_disturbs_nobody(tmp_path: Path) -> None:
    model = tiny_olmoe(layers=2)
    with torch.no_grad(), MoETracer(model) as tracer:
        writer = MetricsWriter(tracer, tmp_path / "missing" / "m.jsonl", rank=0, seconds=0)
        for _ in range(3):
            model(**token_batch(1, 5))
            writer.step()
        writer.close()


def test_they_are_written_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = MoETracer(tiny_olmoe(layers=2))
    monkeypatch.delenv("MOE_TRACE_VLLM_METRICS", raising=False)
    assert not wanted() and start_metrics(tracer) is None
    monkeypatch.setenv("MOE_TRACE_VLLM_METRICS", str(tmp_path / "m.jsonl"))
    writer = start_metrics(tracer)
    assert writer is not None
    writer.close()


def _line(rank: int, tokens: int, **figures: Any) -> bytes:
    layers = {"L00": {"load_max_over_mean": 1.5, "distinct_experts": 4.0, "dead_experts": None, **figures}}
    counts = {"tokens": 1, "forwards": 1, "tokens_total": tokens, "forwards_total": 2}
    return json.dumps({"time": 1.0, "rank": rank, "layers": layers, **counts}).encode() + b"\n"


def test_the_newest_whole_line_of_each_rank_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert last_lines(path) == {}
    old = _line(1, 1) * 40_000  # beyond what is read of the end
    path.write_bytes(old + _line(0, 10) + _line(2, 5) + b"not json\n[1]\n" + _line(0, 20) + _line(0, 30)[:-9])
    found = last_lines(path)
    assert {rank: line["tokens_total"] for rank, line in found.items()} == {0: 20, 1: 1, 2: 5}


PAGE = """
import os, sys
from pathlib import Path
from prometheus_client import REGISTRY, generate_latest
from moe_trace.integrations.vllm.metrics_page import serve_metrics
serve_metrics(); serve_metrics()
assert "torch" not in sys.modules
print(generate_latest(REGISTRY).decode())
"""

WORKER = """
import sys, torch
from pathlib import Path
from models import tiny_olmoe, token_batch
from moe_trace.integrations.vllm.metrics import MetricsWriter
from moe_trace.record.tracer import MoETracer
model = tiny_olmoe(layers=2)
with torch.no_grad(), MoETracer(model) as tracer:
    writer = MetricsWriter(tracer, Path(sys.argv[1]), rank=1, seconds=0)
    for length in (5, 4):
        model(**token_batch(1, length))
        writer.step()
    writer.close()
"""

SERVER = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_default_registry_answers_with_the_file(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    path = tmp_path / "m.jsonl"
    path.write_bytes(_line(0, 10) + _line(1, 5, dead_experts=2))
    text = run(PAGE, MOE_TRACE_VLLM_METRICS=str(path))
    assert 'moe_trace_load_max_over_mean{layer="L00",rank="0"} 1.5' in text
    assert 'moe_trace_dead_experts{layer="L00",rank="1"} 2.0' in text
    assert 'moe_trace_dead_experts{layer="L00",rank="0"}' not in text
    assert 'moe_trace_tokens_total{rank="1"} 5.0' in text


def test_nothing_stands_there_before_the_first_line(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    assert list(FileCollector(tmp_path / "m.jsonl").collect()) == []


def test_workers_leave_theirs_where_several_servers_share_a_folder(tmp_path: Path) -> None:
    """As vLLM's `/metrics` reads it then: by MultiProcessCollector, from a process of its own."""
    pytest.importorskip("prometheus_client")
    shared = tmp_path / "prometheus"
    shared.mkdir()
    run(WORKER, str(tmp_path / "m.jsonl"), PROMETHEUS_MULTIPROC_DIR=str(shared))
    text = run(SERVER, PROMETHEUS_MULTIPROC_DIR=str(shared))
    assert 'moe_trace_tokens_total{rank="1"} 9.0' in text
    (last,) = lines_of(tmp_path / "m.jsonl")[-1:]
    for site, figures in last["layers"].items():
        assert f'moe_trace_distinct_experts{{layer="{site}",rank="1"}} {figures["distinct_experts"]}' in text
