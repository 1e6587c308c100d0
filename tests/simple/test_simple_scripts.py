"""Tests of `scripts/compare_routing.py`: every rule changes the loss of the demo model as expected."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_trace.demo import load_demo_model
from paths import ROOT

SCRIPTS = ROOT / "scripts"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], Any]:
    script = load("compare_routing")
    return {(o.rule, o.renormalise): o for o in script.compare(*load_demo_model())}


def test_loss_falls_with_k(outcomes: dict[tuple[str, str], Any]) -> None:
    trained = outcomes["as trained", ""]
    by_k = [outcomes[f"top_k({k})", "none"] for k in (1, 2, 3, 4)]
    assert [o.k_mean for o in by_k] == [o.computed_per_token for o in by_k] == [1, 2, 3, 4]
    losses = [o.loss for o in by_k]
    assert losses == sorted(losses, reverse=True)
    assert by_k[3].loss == pytest.approx(trained.loss, abs=1e-6)
    assert by_k[0].loss > trained.loss + 0.1
    assert outcomes["top_k(8)", "none"].computed_per_token == 8


@pytest.mark.parametrize(
    ("rule", "parameters"),
    [
        ("cumulative_mass", (0.3, 0.4, 0.5, 0.6)),
        ("confidence_threshold", (0.2, 0.1, 0.05)),
        ("drop_over_capacity", (0.5, 1.0, 1.5)),
    ],
)
def test_every_rule_skips_and_costs_loss(
    outcomes: dict[tuple[str, str], Any], rule: str, parameters: tuple[float, ...]
) -> None:
    ordered = [outcomes[f"{rule}({p})", "none"] for p in parameters]
    k = [o.k_mean for o in ordered]
    assert k == sorted(k) and 0 < k[0] < k[-1] < 4
    for outcome in ordered:
        assert outcome.computed_per_token == 4, "a skipped slot is computed all the same"
        assert outcome.skipped_share == pytest.approx(1 - outcome.k_mean / 4)
    assert ordered[0].loss > ordered[-1].loss > outcomes["as trained", ""].loss


def test_the_scripts_print_their_tables(tmp_path: Path) -> None:
    def run(*command: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            env={
                "PYTHONPATH": str(SCRIPTS.parent),
                "PATH": "",
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            },
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    printed = run("compare_routing.py", "--markdown", str(tmp_path / "t.md"))
    markdown = (tmp_path / "t.md").read_text("utf-8").splitlines()
    assert len(markdown) == len(printed) + 1
    assert {line.count("|") for line in markdown} == {12}
    costs = run("bench_simple.py", "--tokens", "64", "--repeats", "1")
    assert [line.split()[0] for line in costs[-3:]] == ["hooks", "reduce", "naive"]
