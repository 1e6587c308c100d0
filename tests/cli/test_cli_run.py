"""Tests of `moe-trace run` and `routers` as a user runs them: one process each, no terminal.

One process of each is started from scratch; the others are forked with torch already imported.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fork_server import ForkServer
from model_config import CONFIG
from spliced import recording_in

Ended = subprocess.CompletedProcess[str]


def moe_trace(*arguments: object) -> Ended:
    command = [sys.executable, "-m", "moe_trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def forked(fork_server: ForkServer) -> Callable[..., Ended]:
    """As `moe_trace`, without the seconds that the import of torch takes."""

    def run(*arguments: object) -> Ended:
        return fork_server.run(Path.cwd(), "-m", "moe_trace", *map(str, arguments))

    return run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def the_trace(folder: Path) -> dict[str, object]:
    (path,) = folder.glob("*.pt.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))  # type: ignore[no-any-return]


def test_demo_run_prints_figures_files_and_next_commands(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = moe_trace("run", "--steps", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(tmp_path) not in line)
    for label in ("L00", "L01", "L02", "L03"):
        assert len(re.findall(rf"^{label}\b", done.stdout, re.MULTILINE)) == 2
    assert f"moe-trace report {out}" in done.stdout
    report = moe_trace("report", out, "--format", "json")
    figures = json.loads(report.stdout)
    assert figures["schema_version"] == 1
    assert figures["model"]["name"] == "demo"
    assert [r["site"] for r in figures["routers"]] == ["L00", "L01", "L02", "L03"]
    assert [r["calls"] for r in figures["routers"]] == [2] * 4
    recorded = recording_in(the_trace(out))["samples"]  # type: ignore[index]
    for number, router in enumerate(figures["routers"]):
        rows = [a for a, r in zip(recorded["assignments"], recorded["router"], strict=True) if r == number]
        assert router["assignments"] == [sum(column) for column in zip(*rows, strict=True)]
    assert list(out.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("mode", "stages"),
    [("generate", {"prefill": 1, "decode": 3}), ("train", {"train": 1}), ("prefill", {"prefill": 1})],
)
def test_modes_on_a_config_with_random_weights(
    config: Path, tmp_path: Path, forked: Callable[..., Ended], mode: str, stages: dict[str, int]
) -> None:
    sizes = ("--batch", 2, "--seq-len", 16, "--max-new-tokens", 4, "--steps", 1, "--dtype", "float32")
    done = forked(
        "run", "--model", config, "--random-weights", "--mode", mode, *sizes, "--out", tmp_path / "o"
    )
    assert done.returncode == 0, done.stderr
    samples = recording_in(the_trace(tmp_path / "o"))["samples"]  # type: ignore[index]
    first_layer = [s for s, r in zip(samples["stage"], samples["router"], strict=True) if r == 0]
    assert {stage: first_layer.count(stage) for stage in set(first_layer)} == stages
    assert samples["tokens"][0] == 32


def test_several_lengths_and_named_texts_are_compared(tmp_path: Path, forked: Callable[..., Ended]) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(
        json.dumps({"prose": "In the beginning was the word.", "code": "def f(x): return x + 1"})
    )
    done = forked("run", "--prompts-file", texts, "--seq-len", "16,32", "--steps", 1, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    folders = ["code-16", "code-32", "prose-16", "prose-32"]
    assert sorted(f.name for f in (tmp_path / "o").iterdir()) == folders
    comparison = done.stdout.split("Comparison")[1].split("\n\n")[0]
    for name, tokens in (("prose 16", 16), ("prose 32", 32), ("code 16", 16), ("code 32", 32)):
        (row,) = re.findall(rf"^{name} +(\d+) .*$", comparison, re.MULTILINE)
        assert int(row) == tokens
    assert recording_in(the_trace(tmp_path / "o" / "code-32"))["samples"]["tokens"] == [32] * 4  # type: ignore[index]
    lengths = forked("run", "--seq-len", "8,24", "--batch", 1, "--steps", 1, "--out", tmp_path / "l")
    assert lengths.returncode == 0, lengths.stderr
    assert sorted(f.name for f in (tmp_path / "l").iterdir()) == ["seq-24", "seq-8"]


def test_layers_every_and_shapes(config: Path, tmp_path: Path, forked: Callable[..., Ended]) -> None:
    options = ("--layers", "L01", "--every", 2, "--steps", 4, "--record-shapes", "--with-stack")
    done = forked("run", "--model", config, "--random-weights", *options, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    trace = the_trace(tmp_path / "o")
    assert trace["record_shapes"] == trace["with_stack"] == 1
    assert recording_in(trace)["samples"]["step"] == [0, 2]  # type: ignore[index]
    assert [r["site"] for r in recording_in(trace)["routers"]] == ["L01"]  # type: ignore[index]


def test_full_folder_needs_force_which_touches_only_our_files(
    config: Path, tmp_path: Path, forked: Callable[..., Ended]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = ("run", "--model", config, "--random-weights", "--steps", 1, "--out", out)
    refused = forked(*arguments)
    assert refused.returncode == 6
    assert "--force" in refused.stderr
    assert [f.name for f in out.iterdir()] == ["notes.txt"]
    for _ in range(2):
        assert forked(*arguments, "--force").returncode == 0
    assert len(list(out.glob("*.pt.trace.json.gz"))) == 1
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--model", "{config}"], 2, "add --random-weights"),
        (["run", "--model", "{tmp}/nothing"], 7, "cannot load the model"),
        (["run", "--steps", "0"], 2, "--steps must be at least 1"),
        (["run", "--seq-len", "32,zero"], 2, "expected whole numbers"),
        (["run", "--device", "abc", "--out", "{tmp}/o"], 2, "expected auto, cpu or cuda"),
        (["run", "--prompt", "a", "--prompts-file", "b"], 2, "not both"),
        (["run", "--prompts-file", "{tmp}/none.txt", "--out", "{tmp}/o"], 2, "cannot be read as prompts"),
        (["run", "--layers", "77", "--out", "{tmp}/o"], 2, "layers= names ['77']"),
        (["run", "--out", "/proc/moe"], 6, "cannot be written"),
        (["report", "{tmp}/none.json"], 5, "none.json"),
    ],
)
def test_mistakes_get_one_clear_line(
    config: Path, tmp_path: Path, forked: Callable[..., Ended], arguments: list[str], code: int, message: str
) -> None:
    done = forked(*(a.format(config=config, tmp=tmp_path) for a in arguments))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("moe-trace: error: ")


@pytest.mark.parametrize("command", ["run", "routers", "report"])
def test_help_has_an_example_that_parses(command: str) -> None:
    done = moe_trace(command, "--help")
    assert done.returncode == 0
    assert re.search(rf"^Example: moe-trace {command} ", done.stdout, re.MULTILINE)


def test_routers_lists_without_weights(config: Path) -> None:
    done = moe_trace("routers", config)
    assert done.returncode == 0, done.stderr
    assert "2 routers" in done.stdout
    assert "OlmoeTopKRouter" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_routers_of_a_dense_model_says_what_was_found(tmp_path: Path, forked: Callable[..., Ended]) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 8})
    )
    done = forked("routers", path)
    assert done.returncode == 3
    assert "found 0 routers in LlamaForCausalLM" in done.stderr
