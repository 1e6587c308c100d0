"""`moe-trace run script.py`: a program of the user's, as `python` runs it, with its model recorded."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_trace.data.errors import NothingRecorded
from moe_trace.read.reader import TraceSummary, read_summary
from paths import ROOT

TRAIN = """
    import sys
    import torch
    from helper_beside import lengths            # a module of the user's, in the script's folder
    from moe_trace.demo import load_demo_model

    assert __name__ == "__main__" and sys.argv == [__file__, "--steps", "3"]
    torch.nn.Linear(2, 2)(torch.ones(1, 2))      # a model without routers comes first
    model = load_demo_model()[0].train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(int(sys.argv[2])):
        ids = torch.randint(3, 250, (1, lengths))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("the script's own words")
"""


def run(folder: Path, text: str, *options: str, own: tuple[str, ...] = ()) -> tuple[int, str, str]:
    script = folder / "train.py"
    script.write_text(textwrap.dedent(text))
    (folder / "helper_beside.py").write_text("lengths = 16\n")
    command = [sys.executable, "-m", "moe_trace", "run", *options, "-o", str(folder / "runs"), str(script)]
    done = subprocess.run(
        [*command, *own],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def trace_in(folder: Path) -> TraceSummary:
    (trace,) = (folder / "runs").glob("*.pt.trace.json.gz")
    return read_summary(trace)


def test_a_training_script_is_recorded_with_its_backward(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, TRAIN, own=("--steps", "3"))
    assert code == 0, err
    assert out.startswith("the script's own words") and "Files written" in out and "moe-trace ask" in out
    summary = trace_in(tmp_path)
    assert summary.stage == "train" and summary.totals.calls == 3 * 4 and summary.totals.steps == 3
    assert summary.phases is not None and summary.phases.total.backwards == 3 * 4
    assert summary.phases.whole.moe_share_of_backward is not None


def test_only_so_many_forwards_after_so_many_others(tmp_path: Path) -> None:
    code, _, err = run(
        tmp_path, TRAIN, "--steps", "1", "--warmup", "1", "--layers", "2", own=("--steps", "3")
    )
    assert code == 0, err
    summary = trace_in(tmp_path)
    assert [router.info.site for router in summary.routers] == ["L02"]
    assert summary.totals.calls == 1 and summary.phases is not None and summary.phases.total.backwards == 1


ONE_FORWARD = """
    import torch
    from moe_trace.demo import load_demo_model

    model, _ = load_demo_model()
    with torch.no_grad():
        model(torch.randint(3, 250, (1, 16)))
    {ending}
"""


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('words of its own')", 1, "words of its own"),
        ("raise ValueError('of the script')", 1, "ValueError: of the script"),
        ("raise KeyboardInterrupt", 130, "interrupted after 1 forwards; what was recorded is kept in"),
    ],
)
def test_what_was_recorded_is_kept_however_it_ends(
    tmp_path: Path, ending: str, code: int, words: str
) -> None:
    got, out, err = run(tmp_path, ONE_FORWARD.format(ending=ending))
    assert (got, words in err) == (code, True), err
    assert trace_in(tmp_path).totals.calls == 4
    assert code == 130 or "Files written" in out


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("import torch; torch.nn.Linear(2, 2)(torch.ones(1, 2))", (), "called no model with MoE routers"),
        (ONE_FORWARD.format(ending=""), ("--warmup", "2"), "--warmup 2 left them out"),
        ("print(1)", ("--mode", "train"), "--mode is of a model that moe-trace runs"),
    ],
)
def test_nothing_to_record_is_said_and_leaves_no_folder(
    tmp_path: Path, text: str, options: tuple[str, ...], words: str
) -> None:
    code, _, err = run(tmp_path, text, *options)
    assert code and words in err and not (tmp_path / "runs").exists()


OWN_PROFILER = """
    import torch
    from moe_trace.demo import load_demo_model

    model, ids = load_demo_model()[0], torch.randint(3, 250, (1, 16))
    with torch.no_grad():
        for _ in range({before}):
            model(ids)
        with torch.{kind}() as prof:
            model(ids)
    print("events of its own:", len(prof.key_averages()) > 10)
"""


@pytest.mark.parametrize("kind", ["profiler.profile", "autograd.profiler.profile"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_program_with_a_profiler_of_its_own_keeps_it(tmp_path: Path, kind: str, before: int) -> None:
    script = tmp_path / "own.py"
    script.write_text(textwrap.dedent(OWN_PROFILER).format(before=before, kind=kind))
    command = [sys.executable, "-m", "moe_trace", "run", "-o", str(tmp_path / "out"), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert "events of its own: True" in done.stdout
    assert f"recording ended after {before} forwards" in done.stderr
    if before:
        (trace,) = (tmp_path / "out").glob("*.pt.trace.json.gz")
        assert done.returncode == 0 and read_summary(trace).totals.calls == before * 4
    else:
        assert done.returncode == NothingRecorded.exit_code and not (tmp_path / "out").exists()
