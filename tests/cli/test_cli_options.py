"""Properties of all commands: unique outputs, options explained, narrow terminals, Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_trace.cli import COMMANDS, main
from moe_trace.cli.run.program import new_folder
from moe_trace.data.display import tables
from moe_trace.data.errors import Interrupted
from moe_trace.read.reader import read_recording, read_summary
from moe_trace.workload.config import RunConfig

DATA = Path(__file__).parent.parent / "data/h100"
GENERATE = str(DATA / "generate_static_cache.pt.trace.json.gz")
TRAINED = str(DATA / "train_checkpointed.pt.trace.json.gz")


def run(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"moe_trace.cli.{COMMANDS[command][0]}").add_arguments(parser)
    silent = [a.option_strings or a.dest for a in parser._actions if a.help in (None, "")]
    assert silent == [] or silent == [["--phase"]]
    assert "%%" not in parser.format_help()
    writes = {o for action in parser._actions for o in action.option_strings}
    assert ("--force" in writes) == ("-f" in writes) and ("--out" in writes) <= ("-o" in writes)


def test_a_run_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = new_folder("org/My Model", "train", alone=True)
    first.mkdir(parents=True)
    second = new_folder("org/My Model", "train", alone=True)
    assert first.parent == Path("moe_trace_runs") and first.name.startswith("org-My-Model-train-")
    assert second != first and not second.exists()


def test_top_k_and_implementation_are_set_and_recorded(tmp_path: Path) -> None:
    options = ("--steps", 1, "--warmup", 0, "--seq-len", 16, "--top-k", 2)
    code, out, err = run("run", *options, "--experts-implementation", "grouped_mm", "-o", tmp_path / "runs")
    assert code == 0, err
    assert f"moe-trace view {tmp_path / 'runs'}" in out
    (trace,) = (tmp_path / "runs").glob("*.pt.trace.json.gz")
    recording = read_recording(trace)
    assert {r.top_k for r in recording.routers} == {2}
    assert recording.model["experts_implementation"] == "grouped_mm"
    assert recording.model["config"]["num_experts_per_tok"] == 2
    assert read_summary(trace).routers[0].decisions.k_mean == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--top-k", "99"), "the model has 16 experts"),
        (("--top-k", "0"), "--top-k must be at least 1"),
        (("--experts-implementation", "magic"), "--experts-implementation magic"),
    ],
)
def test_bad_choices_leave_no_folder(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    code, _, err = run("run", "--steps", 1, *options, "-o", tmp_path / "runs")
    assert code == 2 and words in err and not (tmp_path / "runs").exists()


def test_ctrl_c_names_what_it_kept(tmp_path: Path) -> None:
    from moe_trace.workload.runner import run as run_workload

    seen: list[str] = []

    def interrupt(what: str, done: int, total: int) -> None:
        seen.append(what)
        if what == "recording" and seen.count("recording") == 3:
            raise KeyboardInterrupt

    config = RunConfig(steps=9, warmup=0, seq_len=16, out=tmp_path / "runs")
    with pytest.raises(Interrupted, match=r"interrupted after 2 of 9 recorded steps; .* kept in") as error:
        run_workload(config, interrupt)
    (trace,) = config.out.glob("*.pt.trace.json.gz")
    assert str(trace) in str(error.value) and error.value.exit_code == 130
    assert read_summary(trace).totals.steps == 2


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 60, 79])
def test_a_narrow_terminal_is_respected(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(sys, "stdout", _Terminal())
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((width, 20)))
    headings = ["layer", *(f"metric{i}" for i in range(9))]
    rows = [[f"L{i:02}", *(f"{i}{j}.5" for j in range(9))] for i in range(3)]
    text = tables.table(headings, rows)
    assert max(map(len, text.splitlines())) <= width
    words: Any = text.split()
    assert all(heading in words for heading in headings) and all(
        cell in words for row in rows for cell in row
    )
    assert max(map(len, tables.paragraph("some words " * 30).splitlines())) <= width


@pytest.mark.parametrize(
    "command", [("report", GENERATE), ("ask", GENERATE), ("report", TRAINED), ("diff", GENERATE, GENERATE)]
)
def test_columns_of_the_environment_are_respected(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if "/" not in line]
    assert 50 < max(map(tables.columns, lines)) <= 60


def test_ctrl_c_before_anything_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_trace.workload.runner._prepare", interrupt)
    code, _, err = run("run", "-o", tmp_path / "runs")
    assert code == 130 and "before the first recorded step; nothing was written" in err
    assert not (tmp_path / "runs").exists()


def test_a_pipe_gets_tables_of_one_width() -> None:
    row = ["x" * 30] * 4
    assert len(tables.table(row, [row]).splitlines()) == 2
