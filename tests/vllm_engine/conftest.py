"""Fixtures for vLLM's real engine, each start in a separate process; skipped if vLLM is not installed.

`make test-vllm` runs them in an environment that has it. (This folder is not called `vllm`, because tests/ is
on the path and the folder would shadow the package.)
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT
from vllm_runs import ENVIRONMENT, EngineRun, Runner

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        mark = pytest.mark.skip(reason="needs vLLM: make test-vllm")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(mark)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which moe_trace is installed, as pip installs it: vLLM finds its entry point there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "moe_trace", source / "moe_trace", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=200)
    return target


@pytest.fixture(scope="session")
def engine_run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """`engine_run(phases, in_process=, profiler=, environment=, **engine)`; see `engine_run.py`."""

    def run(
        phases: list[dict[str, Any]],
        *,
        in_process: bool = False,
        profiler: bool = True,
        environment: dict[str, str] | None = None,
        compiled_oracle: bool = False,
        **engine: Any,
    ) -> EngineRun:
        folder = tmp_path_factory.mktemp("engine")
        env = (
            os.environ | ENVIRONMENT | {"PYTHONPATH": f"{installed}{os.pathsep}{HERE}"} | (environment or {})
        )
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
        env.setdefault("VLLM_CACHE_ROOT", str(folder / "cache"))
        if in_process:
            engine["distributed_executor_backend"] = "uni"
        if profiler:
            options = {"torch_profiler_dir": str(folder / "traces"), "torch_profiler_with_stack": False}
            engine["profiler_config"] = {"profiler": "torch", **options}
        spec = {"out": str(folder / "result.json"), "phases": phases, "engine": engine}
        spec["compiled_oracle"] = compiled_oracle
        done = subprocess.run(
            [sys.executable, str(HERE / "engine_run.py"), json.dumps(spec)],
            env=env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        traces = sorted((folder / "traces").glob("*.pt.trace.json*"), key=os.path.getmtime)
        return EngineRun(json.loads((folder / "result.json").read_text()), traces, done.stdout)

    return run
