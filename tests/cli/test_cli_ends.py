"""Tests of input pipes, closed or full output streams and names of any bytes: messages, never tracebacks."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT
from tiny_trace import write_tiny

Result = subprocess.CompletedProcess[str]


def shell(command: str, **environment: str) -> Result:
    moe_trace = f"{sys.executable} -m moe_trace"
    return subprocess.run(
        ["bash", "-c", command.replace("moe-trace", moe_trace)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "a.pt.trace.json")


@pytest.mark.parametrize(
    "command",
    [
        "moe-trace report <(zcat {packed}) --format json",
        "zcat {packed} | moe-trace report - --format json",
        "cat {packed} | moe-trace report /dev/stdin --format json",
        "moe-trace report - --format json < {packed}",
    ],
)
def test_pipes_give_what_the_file_gives(command: str, trace: Path) -> None:
    packed = trace.with_name("packed")
    packed.write_bytes(gzip.compress(trace.read_bytes()))
    result = shell(command.format(packed=packed))
    assert result.returncode == 0, result.stderr
    truth = json.loads(shell(f"moe-trace report {trace} --format json").stdout)
    assert json.loads(result.stdout)["phases"] == truth["phases"]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("moe-trace report {t} > /dev/full", 6),
        ("moe-trace report {t} >&-", 0),
        ("moe-trace report {t} 2>&- | head -c 1", 0),
        ("moe-trace report {t} 2>&1 > /dev/full 2> /dev/full", 6),
        ("moe-trace report {t} --html " + "n" * 300, 6),
        ("moe-trace report " + "n" * 300, 5),
        ("moe-trace report {t} --html {t} --force", 6),
        ("moe-trace export {t} --to csv --out {t} --force", 6),
        ("moe-trace merge {t} {t} --out {t} --force", 6),
        ("moe-trace report - < /dev/null", 5),
    ],
)
def test_ends_that_fail_fail_in_words(command: str, code: int, trace: Path) -> None:
    before = trace.read_bytes()
    result = shell(command.format(t=trace))
    assert result.returncode == code, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    assert trace.read_bytes() == before


def test_an_ascii_terminal_gets_escapes_and_json_stays_json(tmp_path: Path) -> None:
    trace = write_tiny(tmp_path / "µ…😀.pt.trace.json")
    for form in ("text", "json", "csv"):
        result = shell(
            f"moe-trace report '{trace}' --format {form}", PYTHONIOENCODING="ascii", PYTHONUTF8="1"
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.isascii()
        if form == "json":
            assert json.loads(result.stdout)["trace"] == str(trace)


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a.json").rename(os.fsdecode(bytes(tmp_path) + b"/\xff\xfe.pt.trace.json"))
    for command in ("report {d}", "report {d} --format json", "check {d}", "report {d} --html {d}/r.html"):
        result = shell("moe-trace " + command.format(d=tmp_path))
        assert result.returncode == 0, result.stderr


def test_a_folder_is_read_as_far_as_it_can_be(trace: Path) -> None:
    folder = trace.parent
    (folder / "._a.pt.trace.json").write_bytes(b"\0\5\26\7")
    (folder / "empty.pt.trace.json").touch()
    (folder / "foreign.pt.trace.json").write_text('{"traceEvents": []}')
    (folder / ".moe_trace-left").mkdir()
    (folder / ".moe_trace-left" / "x.pt.trace.json").write_text("{")
    os.mkfifo(folder / "pipe.pt.trace.json")
    result = shell(f"moe-trace report {folder} --format json")
    assert result.returncode == 0, result.stderr
    notes = json.loads(result.stdout)["notes"]
    assert any("empty.pt.trace.json" in note and "empty file" in note for note in notes)
    assert any("foreign.pt.trace.json" in note for note in notes)
    assert not any("._a" in note or "moe_trace-left" in note for note in notes)
    checked = shell(f"moe-trace check {folder}")
    assert checked.returncode == 1 and "file can be read" in checked.stdout
