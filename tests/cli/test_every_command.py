"""Tests of each command with any pipe, program name and output stream: results or messages, no traceback.

A new command without a line here fails `test_no_command_is_left_out`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_trace.cli import COMMANDS
from moe_trace.read.routes.interchange.files import export_routes
from paths import ROOT
from tiny_ranks import Run, write_ranks
from tiny_routes import random_routes
from tiny_trace import write_tiny

Result = subprocess.CompletedProcess[bytes]
CONFIG = {
    "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_size": 16, "intermediate_size": 16,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "num_hidden_layers": 1, "vocab_size": 64,
}  # fmt: skip
PROGRAM = """
import torch, transformers
model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**CONFIG))
model(torch.arange(8)[None])
""".replace("CONFIG", repr({k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")}))

# {a}, {b}: traces of two ranks; {r}, {s}: routes; {n}: captured ids; {o}: the beginning of an output's name.
READING = {
    "report": "report {a} --format json",
    "report --html": "report {a} --html {o}.html",
    "ask": "ask {a} {b} --format json",
    "diff": "diff {a} {b} --format json",
    "check": "check {a} --format json",
    "export": "export {a} --to csv --out {o}.csv",
    "export --to perfetto": "export {a} --to perfetto --out {o}.pftrace",
    "export --to eplb": "export {a} --to eplb --out {o}.npy",
    "merge": "merge {a} {b} --out {o}.json",
    "placement": "placement {a} --ranks 2 --format json --out {o}.json",
    "routes check": "routes check {r} --format json",
    "routes study": "routes study {r} --format json",
    "routes cache": "routes cache {r} --experts-in-memory 2,4 --format json",
    "routes diff": "routes diff {r} {s} --format json",
    "routes import": "routes import {n} --as .npy --out {o}.routes.npz",
    "routes export": "routes export {r} --to npy --out {o}.npy",
}
BESIDE = {"reduce": "reduce {a}"}
MODELS = {
    "routers": "routers {config} --format json",
    "run": "run --model {config} --random-weights --steps 1 --warmup 0 --seq-len 8 --out {o}",
    "run a program": "run --steps 1 --out {o} {program}",
}
SILENT = ("report --html", "export", "export --to perfetto", "export --to eplb", "routes export")
"""They say where they wrote to on standard error."""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return written(tmp_path)


def written(folder: Path) -> dict[str, str]:
    """A file for each name of the templates."""
    write_ranks(folder, Run())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "program.py").write_text(PROGRAM)
    a, b = sorted(folder.glob("*trace.json*"))
    routes = random_routes(40).save(folder / "r.routes.npz")
    export_routes(random_routes(40), folder / "n.npy", "npy")
    paths = {
        "a": a,
        "b": b,
        "r": routes,
        "s": routes,
        "n": folder / "n.npy",
        "config": folder / "config.json",
        "program": folder / "program.py",
    }
    return {**{name: shlex.quote(str(path)) for name, path in paths.items()}, "o": f"{folder}/out"}


def shell(command: str, **environment: str) -> Result:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    arguments = ["bash", "-c", f'moe() {{ {sys.executable} -m moe_trace "$@"; }}; {command}']
    return subprocess.run([os.fsencode(a) for a in arguments], capture_output=True, env=env, timeout=300)


def in_words(result: Result) -> str:
    """What it said on standard error, which is no traceback."""
    error = result.stderr.decode("utf-8", "backslashreplace")
    assert "Traceback" not in error and "Exception ignored" not in error, error
    return error


def numbers(value: Any) -> list[Any]:
    """All keys and leaves of a JSON value but texts and names of files."""
    if isinstance(value, dict):
        return [
            k for key, one in value.items() for k in (key * ("/" not in key and key != "-"), *numbers(one))
        ]
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [] if isinstance(value, str) else [value]


def test_no_command_is_left_out() -> None:
    tried = {template.split()[0] for template in (*READING.values(), *BESIDE.values(), *MODELS.values())}
    assert {*tried, "view"} == set(COMMANDS)


# -- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*READING, "routers"])
def test_a_pipe_gives_what_the_file_gives(command: str, files: dict[str, str]) -> None:
    template = {**READING, **MODELS}[command]
    source = {"routers": "config", "routes import": "n"}.get(command, "r" if "routes" in command else "a")
    truth = shell("moe " + template.format(**files))
    assert truth.returncode == 0, in_words(truth)
    for given, stdin in ((f"<(cat {files[source]})", ""), ("-", f" < {files[source]}")):
        check_pipe(template, truth, {**files, source: given, "o": files["o"] + "2"}, stdin)


def check_pipe(template: str, truth: Result, files: dict[str, str], stdin: str) -> None:
    """It gives what the file gave, whose outputs are `out.*`; its own are `out2.*`."""
    result = shell("moe " + template.format(**files) + stdin)
    assert result.returncode == 0, in_words(result)
    in_words(result)
    if "--format json" in template:
        assert numbers(json.loads(result.stdout)) == numbers(json.loads(truth.stdout)) != []
    folder = Path(files["o"]).parent
    for target in folder.glob("out.*"):
        again = target.with_name(target.name.replace("out.", "out2."))
        as_text = [re.sub(rb"(?m)^[^,\n]+,", b"", file.read_bytes()) for file in (target, again)]
        if target.suffix not in (".html", ".json"):
            assert as_text[0] == as_text[1]
        assert again.stat().st_size > 0
        again.unlink()


def test_one_standard_input_is_not_two_traces(files: dict[str, str]) -> None:
    result = shell(f"moe diff - - < {files['a']}")
    assert result.returncode == 2 and "read once" in in_words(result)


def test_what_is_wrong_with_a_pipe_is_said_of_the_pipe() -> None:
    for given in ("-", "<(echo nothing)"):
        result = shell(f"echo nothing | moe report {given}")
        assert result.returncode == 5
        assert "/tmp" not in in_words(result) and "nothing" not in in_words(result).split(":")[0]


@pytest.mark.parametrize("form", ["npy", "json"])
def test_counts_come_through_a_pipe(form: str, files: dict[str, str]) -> None:
    counts = f"{files['o']}.{form}"
    assert shell(f"moe export {files['a']} --to eplb --out {counts}").returncode == 0
    truth = shell(f"moe placement {counts} --ranks 2 --format json")
    result = shell(f"cat {counts} | moe placement - --ranks 2 --format json")
    assert result.returncode == truth.returncode == 0, in_words(result)
    assert numbers(json.loads(result.stdout)) == numbers(json.loads(truth.stdout))


def test_a_program_comes_through_a_pipe(files: dict[str, str]) -> None:
    result = shell(f"moe run --steps 1 --out {files['o']} - < {files['program']}")
    assert result.returncode == 0, in_words(result)
    assert list(Path(files["o"]).glob("*.pt.trace.json.gz"))


# -- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*READING, *BESIDE, "routers", "run"])
def test_a_full_disk_behind_standard_output_is_said(command: str, files: dict[str, str]) -> None:
    template = {**READING, **BESIDE, **MODELS}[command]
    result = shell("moe " + template.format(**files) + " > /dev/full")
    assert result.returncode == (0 if command in SILENT else 6), in_words(result)
    assert command in SILENT or "standard output cannot be written" in in_words(result)
    in_words(result)


@pytest.mark.parametrize("command", [*READING, *BESIDE, "routers"])
@pytest.mark.parametrize("end", ["| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", ">&- 2>&-"])
def test_nobody_reading_is_no_fault(command: str, end: str, files: dict[str, str]) -> None:
    template = {**READING, **BESIDE, **MODELS}[command]
    result = shell("moe " + template.format(**files) + end)
    assert result.returncode == 0, in_words(result)
    in_words(result)


# -- names -------------------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("command", [*READING, *BESIDE, *MODELS])
def test_any_bytes_are_a_name_and_any_terminal_shows_it(command: str, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe \xc3\xa4\xe2\x80\xae'"))
    folder.mkdir()
    files = written(folder)
    template = {**READING, **BESIDE, **MODELS}[command]
    # torch.profiler and TensorBoard's writer take no such name for what they write.
    out = f"{tmp_path}/out" if command.startswith("run") else shlex.quote(files["o"] + os.fsdecode(b"\xff"))
    result = shell("moe " + template.format(**{**files, "o": out}), **ASCII)
    assert result.returncode == 0, in_words(result)
    in_words(result)
    assert result.stdout.isascii() and result.stderr.isascii()
    if "--format json" in template:
        json.loads(result.stdout)
    if "{o}" in template:
        assert [*folder.glob("out*"), *tmp_path.glob("out/*")]


def test_a_run_under_a_name_that_torch_cannot_write_is_refused_in_words(tmp_path: Path) -> None:
    out = shlex.quote(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    result = shell(f"moe run --out {out}", **ASCII)
    assert result.returncode == 6 and "UTF-8" in in_words(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        *(
            READING[name].replace("{a}", "{long}").replace("{r}", "{long}").replace("{n}", "{long}")
            for name in READING
        ),
        *(READING[name].replace("{o}", "{long}") for name in READING if "{o}" in READING[name]),
        "reduce {long}",
        "view {long}",
        "routers {long}",
        "run --out {long}",
        "run --prompts-file {long}",
        "run --model {long}",
        "run {long}",
    ],
)
def test_a_name_of_300_bytes_is_refused_in_words(command: str, files: dict[str, str]) -> None:
    folder = Path(files["o"]).parent
    before = sorted(folder.iterdir())
    result = shell("moe " + command.format(**files, long=f"{folder}/" + "n" * 300))
    assert result.returncode in (2, 5, 6, 7), in_words(result)
    assert "error: " in in_words(result)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("force", ["", " --force"])
@pytest.mark.parametrize(
    "command",
    [
        "report {folder} --html {a}",
        "report {b} {a} --html {folder}/link",
        "export {folder} --to csv --out {a}",
        "export {a} --to eplb --out {folder}/link",
        "merge {folder} --out {a}",
        "merge {a} {b} --out {folder}/link.json",
        "placement {folder} --ranks 2 --out {a}",
        "placement {folder} --ranks 2 --out {small}",
        "export {folder} --to csv --out {small}",
        "report {folder} --html {small}",
    ],
)
def test_what_is_read_is_never_replaced(command: str, force: str, files: dict[str, str]) -> None:
    folder, first = Path(files["o"]).parent, Path(files["a"])
    (folder / "config.json").unlink()
    (folder / "link").symlink_to(first)
    os.link(first, folder / "link.json")
    small = ""
    if "{small}" in command:
        assert shell(f"moe reduce {files['a']}").returncode == 0
        small = str(next(folder.glob("*.moe_trace")))
    before = {file: file.read_bytes() for file in folder.iterdir()}
    result = shell("moe " + command.format(**files, folder=folder, small=small) + force)
    assert result.returncode == 6, in_words(result)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_view_serves_a_pipe_and_any_name_and_ends_at_a_full_disk(tmp_path: Path) -> None:
    pytest.importorskip("torch_tb_profiler")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.pt.trace.json"))
    write_tiny(tmp_path / "a.json").rename(odd)
    full = shell(f"timeout 60 {sys.executable} -m moe_trace view {shlex.quote(str(odd))} > /dev/full")
    assert full.returncode == 6, in_words(full)
    for given in (shlex.quote(str(odd)), f"<(cat {shlex.quote(str(odd))})"):
        served = shell(f"timeout -s INT 8 {sys.executable} -m moe_trace view {given}", **ASCII)
        assert b"http://" in served.stdout and served.stdout.isascii(), in_words(served)
        in_words(served)
