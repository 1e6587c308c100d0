"""Tests of reports from reduced traces: the same figures, and never from an outdated file."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_trace.cli import main
from moe_trace.data.errors import TraceFileError
from moe_trace.placement.recorded import counts_of_traces
from moe_trace.read.file.filters import Filter
from moe_trace.read.file.folder import find_traces
from moe_trace.read.reader import read_summary
from moe_trace.read.reduced import file as reduced_file
from moe_trace.read.reduced import workers
from moe_trace.read.reduced.inputs import find_inputs
from moe_trace.show.json import render_json
from paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from grow_ranks import grow

DATA = ROOT / "tests/data"
RANKS = 8


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    grow(DATA / "gloo_ep2", folder, RANKS)
    return folder


@pytest.fixture
def run(grown: Path, tmp_path: Path) -> Path:
    """A run of eight ranks, to be changed."""
    folder = tmp_path / "run"
    folder.mkdir()
    for trace in find_traces(grown):
        (folder / trace.name).write_bytes(trace.read_bytes())
    return folder


def figures(path: Path, chosen: Filter | None = None) -> tuple[dict[str, Any], list[str]]:
    """All but where they are from, and the notes."""
    found = json.loads(render_json(read_summary(path, chosen=chosen)))
    return {key: value for key, value in found.items() if key not in ("trace", "files", "notes")}, found[
        "notes"
    ]


def reduce(folder: Path) -> list[Path]:
    assert main(["reduce", str(folder)]) == 0
    return sorted(folder.glob("*.moe_trace"))


def remove_traces(folder: Path) -> None:
    for trace in folder.glob("*.json.gz"):
        trace.unlink()


@pytest.mark.parametrize("chosen", [None, Filter(layers=frozenset(["1"]), steps=frozenset([2, 3]))])
def test_a_run_whose_traces_are_gone_gives_the_same_report(run: Path, chosen: Filter | None) -> None:
    before, notes = figures(run, chosen)
    assert before["ranks"]["world_size"] == RANKS and before["ranks"]["exchanges"]
    assert len(reduce(run)) == RANKS
    assert figures(run, chosen) == (before, notes)
    remove_traces(run)
    after, notes_after = figures(run, chosen)
    assert after == before
    assert set(notes_after) - set(notes) == {
        "8 of 8 traces are gone: these figures are from what they were reduced to"
    }


def test_several_processes_give_the_same_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = figures(run)
    monkeypatch.setattr(workers, "SHARE_BYTES", 1)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    assert workers.worth(find_traces(run)) == 2
    assert figures(run) == before


@pytest.mark.parametrize(
    "name",
    [
        "h100/prefill_decode_16_layers",
        "h100/train_checkpointed",
        "h200/train_grouped_mm",
        "h200_graphs/compiled_layers",
    ],
)
def test_one_trace_says_the_same_reduced(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "a.pt.trace.json.gz"
    trace.write_bytes((DATA / f"{name}.pt.trace.json.gz").read_bytes())
    before = figures(trace)
    calls = [(s.site, s.call) for s in read_summary(trace).samples]
    (small,) = reduce(tmp_path)
    assert figures(small) == before
    assert [(s.site, s.call) for s in read_summary(small).samples] == calls
    assert small.stat().st_size < trace.stat().st_size


def test_placement_counts_the_same(run: Path) -> None:
    before = counts_of_traces(run)
    reduce(run)
    remove_traces(run)
    after = counts_of_traces(run)
    assert [layer.name for layer in after.layers] == [layer.name for layer in before.layers]
    assert (after.counts_SLE == before.counts_SLE).all()


def test_a_stale_file_is_not_used(run: Path) -> None:
    reduce(run)
    trace = find_traces(run)[0]
    stale = reduced_file.reduced_path(trace)
    found = json.loads(gzip.decompress(trace.read_bytes()))
    found["moe_trace"]["samples"]["tokens"] = [7] * len(found["moe_trace"]["samples"]["tokens"])
    trace.write_bytes(gzip.compress(json.dumps(found).encode()))
    inputs = find_inputs(run)
    assert len(inputs) == RANKS and trace in inputs and stale not in inputs
    assert reduced_file.is_reduced(inputs[1])
    reduce(run)
    assert not stale.exists() and find_inputs(run)[0] == reduced_file.reduced_path(trace)


def other_version(small: Path) -> None:
    found = json.loads(gzip.decompress(small.read_bytes()))
    small.write_bytes(gzip.compress(json.dumps({**found, "version": reduced_file.VERSION + 1}).encode()))


def damage(small: Path) -> None:
    small.write_bytes(small.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("change", "said"), [(other_version, "of version 2, expected 1"), (damage, "cannot be")]
)
def test_what_cannot_be_used_is_read_from_the_trace_or_named(run: Path, change: Any, said: str) -> None:
    before = figures(run)
    small = reduce(run)[3]
    change(small)
    assert figures(run) == before
    remove_traces(run)
    after, notes = figures(run)
    assert after["ranks"]["missing"] == [3]
    assert any(small.name in note and said in note for note in notes)
    with pytest.raises(TraceFileError, match=said):
        read_summary(small)


def test_what_another_process_cannot_read_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "rank002.pt.trace.json.gz").write_bytes(b"no trace")
    alone = figures(run)
    monkeypatch.setattr(workers, "worth", lambda files: 2)
    assert figures(run) == alone
    assert any("rank002.pt.trace.json.gz" in note for note in alone[1])


def test_a_process_that_dies_costs_one_trace(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel kills it for memory."""
    start = workers._start

    def start_and_kill(*args: Any) -> Any:
        process = start()
        process.kill()
        monkeypatch.setattr(workers, "_start", start)
        return process

    monkeypatch.setattr(workers, "_start", start_and_kill)
    answers = list(workers.reduce_files(find_traces(run)[:3], 1))
    assert [isinstance(answer, TraceFileError) for answer in answers] == [True, False, False]
    assert "ended with -9" in str(answers[0])


def test_the_command_names_what_it_cannot_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "rank002.pt.trace.json.gz").write_bytes(b"")
    assert main(["reduce", str(run)]) == 1
    out, err = capsys.readouterr()
    assert out.count(".moe_trace: ") == RANKS - 1
    assert "rank002.pt.trace.json.gz" in err


@pytest.mark.parametrize("command", [["check"], ["merge", "--out", "merged.json"]])
def test_commands_that_need_events_ask_for_the_traces(
    run: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = reduce(run)[0]
    remove_traces(run)
    monkeypatch.chdir(run)
    for path in (run, small):
        assert main([*command, str(path)]) == TraceFileError.exit_code
        err = capsys.readouterr().err
        assert "reduced" in err and "give the traces themselves" in err


def test_any_name_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    folder.mkdir()
    source = DATA / "gloo_ep2/rank0.pt.trace.json.gz"
    (folder / os.fsdecode(b"a\xe9\n.pt.trace.json.gz")).write_bytes(source.read_bytes())
    before = figures(folder)
    reduce(folder)
    remove_traces(folder)
    assert figures(folder)[0] == before[0]


def test_a_name_too_long_for_another_costs_that_trace_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "n" * 230):
        source = DATA / "gloo_ep2/rank0.pt.trace.json.gz"
        (tmp_path / f"{name}.pt.trace.json.gz").write_bytes(source.read_bytes())
    assert main(["reduce", str(tmp_path)]) == 1
    assert len(list(tmp_path.glob("*.moe_trace"))) == 1
    assert "File name too long" in capsys.readouterr().err


def test_a_pipe_has_nothing_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert main(["reduce", str(tmp_path / "fifo")]) == TraceFileError.exit_code
    assert "no regular file" in capsys.readouterr().err
