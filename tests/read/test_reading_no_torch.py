"""Tests that `import moe_trace` and the commands that read traces do not import torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tiny_trace import write_tiny

PROGRAM = """
import sys
{body}
heavy = sorted({{"torch", "transformers", "tensorboard"}} & set(sys.modules))
assert not heavy, heavy
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True, text=True, check=False
    )


COMMANDS = {
    "report": "['report', {trace!r}]",
    "json": "['report', {trace!r}, '--format', 'json']",
    "csv": "['report', {trace!r}, '--format', 'csv']",
    "html": "['report', {trace!r}, '--html', {trace!r} + '.html']",
    "diff": "['diff', {trace!r}, {trace!r}]",
    "check": "['check', {trace!r}]",
    "perfetto": "['export', {trace!r}, '--to', 'perfetto', '--out', {trace!r} + '.pftrace']",
    "parquet": "['export', {trace!r}, '--to', 'parquet', '--out', {trace!r} + '.parquet']",
    "eplb": "['export', {trace!r}, '--to', 'eplb', '--out', {trace!r} + '.npy']",
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands(tmp_path: Path, name: str) -> None:
    trace = str(write_tiny(tmp_path / "a.json"))
    body = f"from moe_trace.cli import main\nassert main({COMMANDS[name].format(trace=trace)}) == 0"
    done = run(body)
    assert done.returncode == 0, done.stderr


def test_import_and_reader(tmp_path: Path) -> None:
    trace = str(write_tiny(tmp_path / "a.json.gz"))
    done = run(f"import moe_trace; moe_trace.read_summary({trace!r})._repr_html_()")
    assert done.returncode == 0, done.stderr


def test_the_check_can_fail() -> None:
    done = run("import moe_trace; moe_trace.MoETracer")
    assert done.returncode == 1 and "torch" in done.stderr
