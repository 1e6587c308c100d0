"""Tests of metrics of vLLM's engine without a trace, against its decisions, and of the server's /metrics."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from moe_trace.demo import demo_path
from vllm_runs import PROMPT_TOKENS, ROUTERS, Runner

pytestmark = pytest.mark.timeout(600)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_forward_is_vllms_own(engine_run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    found = engine_run(
        [{"kind": "plain", "oracle": True}, {"kind": "plain"}],
        in_process=True,
        profiler=False,
        enforce_eager=True,
        environment={"MOE_TRACE_VLLM_METRICS": str(path), "MOE_TRACE_VLLM_METRICS_SECONDS": "0"},
    )
    without = engine_run(
        [{"kind": "plain"}],
        in_process=True,
        profiler=False,
        enforce_eager=True,
        environment={"MOE_TRACE_VLLM": "0"},
    )
    assert found.tokens == [without.tokens[0]] * 2
    lines = lines_of(path)
    captured = found.result["phases"][0]["captured"]
    assert sum(line["tokens"] for line in lines) == 2 * (PROMPT_TOKENS + 4 * 5)
    assert lines[-1]["tokens_total"] == 2 * (PROMPT_TOKENS + 4 * 5)
    for i, calls in enumerate(zip(*(captured[name] for name in ROUTERS), strict=True)):
        for site, counts in zip(lines[i]["layers"], calls, strict=True):
            figures = lines[i]["layers"][site]
            assert figures["distinct_experts"] == sum(1 for count in counts if count)
            assert figures["load_max_over_mean"] == pytest.approx(max(counts) / (sum(counts) / 16), abs=1e-4)


def test_in_compiled_code_the_runs_of_random_tokens_count_in_no_window(
    engine_run: Runner, tmp_path: Path
) -> None:
    path = tmp_path / "m.jsonl"
    engine_run(
        [{"kind": "plain"}],
        in_process=True,
        profiler=False,
        environment={"MOE_TRACE_VLLM_METRICS": str(path), "MOE_TRACE_VLLM_METRICS_SECONDS": "0"},
    )
    # A writer that is behind may put two windows into one line.
    assert sum(line["tokens"] for line in lines_of(path)) == PROMPT_TOKENS + 4 * 5


def test_the_servers_own_metrics_carry_them(installed: Path, tmp_path: Path) -> None:
    path, port = tmp_path / "m.jsonl", _free_port()
    environment = {
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(installed)},
        **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
        **{"MOE_TRACE_VLLM_METRICS": str(path), "MOE_TRACE_VLLM_METRICS_SECONDS": "0"},
    }
    options = ["--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo_path())]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, *options, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | environment,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/health", server)
            asked = {"model": str(demo_path()), "prompt": [10, 20, 30, 40, 50, 60], "max_tokens": 4}
            asked |= {"temperature": 0, "ignore_eos": True, "detokenize": False}
            request = urllib.request.Request(
                f"{address}/v1/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=60).read()
            text = _text_with(f"{address}/metrics/", "moe_trace_forwards_total{")
        finally:
            server.terminate()
            server.wait(60)
    assert 'moe_trace_tokens_total{rank="0"} 9.0' in text  # the last token chosen is not routed
    assert 'moe_trace_distinct_experts{layer="L03",rank="0"} 4.0' in text
    assert "vllm:generation_tokens_total" in text


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server does not answer")


def _text_with(address: str, wanted: str) -> str:
    text = ""
    for _ in range(20):
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        if wanted in text and '_total{rank="0"} 4.0' in text:
            break
        time.sleep(0.5)
    return text
