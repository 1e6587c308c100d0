"""Tests of `moe-trace run script.py`: it runs a user's program as Python does and records its models.

Tests that concern the start of Python, the import of torch or an external signal start a new process (`run`).
The others fork one that has imported torch already (`fork_run`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_trace
from fork_server import ForkServer
from moe_trace.data.errors import OutputError, UsageError
from moe_trace.read.reader import TraceSummary, read_summary
from paths import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "KINETO_LOG_LEVEL": "6"}
TRAIN = """
    import torch
    from moe_trace.demo import load_demo_model

    model = load_demo_model()[0].train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(4):
        ids = torch.randint(3, 250, (1, 16))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""
MODEL = """
    import torch
    from moe_trace.demo import load_demo_model

    model, ids = load_demo_model()[0], torch.randint(3, 250, (1, 16))
    torch.set_grad_enabled(False)
"""
Ended = subprocess.CompletedProcess[str]
Run = Callable[..., Ended]


def python(folder: Path, *command: str, stdin: str = "") -> Ended:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=folder,
        timeout=300,
        input=stdin,
    )


def write(folder: Path, *parts: str, name: str = "train.py") -> None:
    (folder / name).write_text("".join(textwrap.dedent(part) for part in parts))


def run(folder: Path, *options: str, own: tuple[str, ...] = (), stdin: str = "") -> Ended:
    """`train.py`, by its relative name."""
    return python(folder, "-m", "moe_trace", "run", "-o", "runs", *options, "train.py", *own, stdin=stdin)


@pytest.fixture
def fork_run(fork_server: ForkServer) -> Run:
    """As `run`, without the seconds that the import of torch takes."""

    def run(folder: Path, *options: str) -> Ended:
        return fork_server.run(folder, "-m", "moe_trace", "run", "-o", "runs", *options, "train.py")

    return run


def traces(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*.pt.trace.json*"))


def only_trace(folder: Path) -> TraceSummary:
    (trace,) = traces(folder)
    return read_summary(trace)


def steps_in(trace: Path) -> list[int]:
    return sorted({sample.step for sample in moe_trace.read_recording(trace).samples})


def test_a_plain_training_script_of_ten_lines(tmp_path: Path) -> None:
    write(tmp_path, TRAIN)
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Files written" in done.stderr and "moe-trace ask" in done.stderr
    summary = only_trace(tmp_path)
    assert summary.stage == "train" and summary.totals.calls == 4 * 4 and summary.totals.steps == 4
    assert summary.phases is not None and summary.phases.total.backwards == 4 * 4


def test_chosen_steps_are_those_of_the_optimizer_and_named_so_in_the_trace(
    tmp_path: Path, fork_run: Run
) -> None:
    """Three forwards a step, two optimizers, and one forward of evaluation."""
    write(
        tmp_path,
        """
        import torch
        from moe_trace.demo import load_demo_model

        model = load_demo_model()[0].train()
        half = list(model.parameters())
        optimizers = [torch.optim.SGD(half[::2], lr=1e-3), torch.optim.AdamW(half[1::2], lr=1e-3)]
        for _ in range(6):
            for _ in range(2):
                ids = torch.randint(3, 250, (1, 8))
                model(ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                model(ids)
        """,
    )
    done = fork_run(tmp_path, "--steps", "2-3", "--layers", "1")
    assert done.returncode == 0, done.stderr
    (trace,) = traces(tmp_path)
    recording = moe_trace.read_recording(trace)
    # The evaluation after an optimizer's step is the first forward of the next one.
    assert [s.step for s in recording.samples] == [2, 2, 2, 3, 3, 3]
    assert {s.site for s in recording.samples} == {"L01"}
    assert [s.stage for s in recording.samples].count("train") == 4
    names = {e["name"] for e in json.loads(_text(trace))["traceEvents"] if "ProfilerStep" in e["name"]}
    assert names == {"ProfilerStep#2", "ProfilerStep#3"}


def _text(trace: Path) -> bytes:
    import gzip

    return gzip.decompress(trace.read_bytes())


def test_where_nothing_is_trained_a_step_is_a_forward(tmp_path: Path, fork_run: Run) -> None:
    write(tmp_path, MODEL, "for _ in range(5): model(ids)\n")
    assert fork_run(tmp_path, "--steps", "1", "--warmup", "3").returncode == 0
    assert only_trace(tmp_path).totals.calls == 4 and steps_in(traces(tmp_path)[0]) == [3]


def test_its_arguments_paths_input_and_main_are_its_own(tmp_path: Path) -> None:
    """What a program sees of how it was started is what `python` shows it, and so in processes it starts."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside.py").write_text("value = 7\n")
    write(
        tmp_path / "sub",
        """
        import argparse, os, pickle, sys
        from dataclasses import dataclass
        import beside

        @dataclass
        class Item:
            value: int

        class Data:
            def __len__(self): return 4
            def __getitem__(self, at): return Item(at).value

        if __name__ == "__main__":
            before = [os.environ.get("HF_HOME"), "torch" in sys.modules]
            import torch
            parser = argparse.ArgumentParser()
            parser.add_argument("--steps", type=int)
            parser.add_argument("-m", "--out")
            parser.add_argument("rest", nargs="*")
            print(sys.argv, parser.parse_args(), beside.value, before)
            print(sys.path[0], __file__, __spec__, __package__, type(__loader__).__name__)
            print(pickle.loads(pickle.dumps(Item(3))), sys.modules["__main__"].Item is Item)
            print(sys.stdin.read(), sys.stdout.errors, sorted(k for k in globals() if k.startswith("__")))
            for start in ("fork", "spawn"):
                loader = torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context=start)
                print([int(one) for one in loader])
        """,
        name="main.py",
    )
    own = ("--steps", "3", "-m", "x", "--", "-a", "--b")
    plain = python(tmp_path, "sub/main.py", *own, stdin="read me")
    ours = python(tmp_path, "-m", "moe_trace", "run", "--steps", "2", "sub/main.py", *own, stdin="read me")
    assert plain.returncode == ours.returncode == 0, ours.stderr
    assert ours.stdout == plain.stdout and "read me" in ours.stdout
    assert "called no model with MoE routers" in ours.stderr
    assert not (tmp_path / "moe_trace_runs").exists()


def test_a_module_by_its_name(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    write(
        package,
        MODEL,
        "import sys; from . import other; model(ids); print(sys.argv[1:], __package__)",
        name="go.py",
    )
    (package / "other.py").touch()
    ours = python(tmp_path, "-m", "moe_trace", "run", "-o", "runs", "-m", "mine.go", "--steps", "3")
    assert ours.returncode == 0 and only_trace(tmp_path).totals.calls == 4, ours.stderr
    assert ours.stdout == "['--steps', '3'] mine\n"
    missing = python(tmp_path, "-m", "moe_trace", "run", "-m", "mine.nothing")
    assert missing.returncode == 1 and "No module named mine.nothing" in missing.stderr


ENDINGS = {
    "sys.exit(3)": "import sys; sys.exit(3)",
    "sys.exit(words)": "import sys; sys.exit('words of its own')",
    "exit by True": "raise SystemExit(True)",
    "error": "raise ValueError('of the script')",
    "error in a function": "def f(): 1 / 0\nf()",
    "its own hook": "import sys; sys.excepthook = lambda kind, error, trace: print('hooked', kind)\nassert 0",
    "Ctrl-C": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "SIGTERM": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    "os._exit": "import os; os._exit(5)",
    "atexit and a thread": (
        "import atexit, threading, time, __main__\natexit.register(lambda: print('ids' in vars(__main__)))\n"
        "threading.Thread(target=lambda: (time.sleep(1), print('thread'))).start()"
    ),
    "a daemon thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    ),
    "syntax": "def (",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_ends_as_it_ends_without_us(tmp_path: Path, fork_run: Run, ending: str) -> None:
    """Status or signal, what it prints, its traceback; what was recorded before is kept."""
    begin = textwrap.dedent(MODEL) + "model(ids)\n"
    write(tmp_path, "\n" * (begin.count("\n") - 1) + "ids = 1\n", ENDINGS[ending] + "\n")  # the same lines
    plain = python(tmp_path, "train.py")
    write(tmp_path, begin, ENDINGS[ending] + "\n")
    ours = fork_run(tmp_path)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout), ours.stderr
    assert plain.stderr in ours.stderr
    if ending in ("SIGTERM", "os._exit", "syntax"):  # nobody could write
        assert not traces(tmp_path)
    else:
        assert only_trace(tmp_path).totals.calls == 4


def test_ctrl_c_from_outside(tmp_path: Path) -> None:
    write(tmp_path, MODEL, "while True:\n    model(ids)\n    print('.', flush=True)\n")
    command = [sys.executable, "-m", "moe_trace", "run", "-o", "runs", "--steps", "99999", "train.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b".\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=120)
    assert child.returncode == -signal.SIGINT
    assert only_trace(tmp_path).totals.calls


OWN = """
    from torch.profiler import *
    schedule = schedule(wait=1, warmup=1, active=2, repeat=2)
    with profile(schedule=schedule, on_trace_ready=tensorboard_trace_handler("theirs")) as prof:
        for _ in range(9):
            model(ids)
            prof.step()
    print(len(prof.key_averages()) > 10)
"""


@pytest.mark.parametrize("before", [0, 3])
def test_a_program_with_a_profiler_of_its_own_gets_the_routing_in_its_traces(
    tmp_path: Path, fork_run: Run, before: int
) -> None:
    """And what we profiled until then is written."""
    write(tmp_path, MODEL, f"for _ in range({before}): model(ids)\n", OWN)
    done = fork_run(tmp_path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    theirs = sorted((tmp_path / "theirs").iterdir())
    assert [read_summary(trace).totals.calls for trace in theirs] == [8, 8]
    assert all(str(trace) in done.stderr for trace in theirs)
    assert [read_summary(trace).totals.calls for trace in traces(tmp_path)] == [4 * before] * bool(before)
    assert (tmp_path / "runs").exists() == bool(before)


def test_a_profiler_that_comes_after_our_steps(tmp_path: Path, fork_run: Run) -> None:
    write(tmp_path, MODEL, "for _ in range(3): model(ids)\n", OWN)
    assert fork_run(tmp_path, "--steps", "1-1").returncode == 0
    assert only_trace(tmp_path).totals.calls == 4
    assert [read_summary(t).totals.calls for t in sorted((tmp_path / "theirs").iterdir())] == [8, 8]


def test_the_profiler_of_autograd_too(tmp_path: Path, fork_run: Run) -> None:
    own = """
    with torch.autograd.profiler.profile() as prof:
        model(ids)
    prof.export_chrome_trace("theirs.json")
    """
    write(tmp_path, MODEL, own)
    assert fork_run(tmp_path).returncode == 0
    assert read_summary(tmp_path / "theirs.json").totals.calls == 4 and not traces(tmp_path)


def test_models_wrapped_compiled_and_several(tmp_path: Path, fork_run: Run) -> None:
    """Each model is recorded; forwards of the first are the steps; a model that is dropped is freed."""
    body = """
    import gc, weakref
    other = load_demo_model()[0]
    fast = torch.compile(model, backend="aot_eager")
    wrapped = torch.nn.Sequential()
    wrapped.inner, wrapped.forward = other, other.forward
    for _ in range(3):
        fast(ids)
        wrapped(ids)
    died = weakref.ref(other)
    del other, wrapped
    gc.collect()
    """
    write(tmp_path, MODEL, body)
    done = fork_run(tmp_path, "--steps", "1-2")
    assert done.returncode == 0, done.stderr
    (trace,) = traces(tmp_path)
    recording = moe_trace.read_recording(trace)
    assert len(recording.samples) == 2 * 2 * 4 and len(recording.routers) == 8
    assert not recording.lost.silent_forwards


def test_a_program_that_forks(tmp_path: Path) -> None:
    """The child runs the model and ends as a program ends; the trace is the parent's."""
    body = """
    import os, sys
    model(ids)
    if os.fork() == 0:
        model(ids)
        sys.exit(0)
    os.wait()
    model(ids)
    """
    write(tmp_path, MODEL, body)
    done = run(tmp_path)
    assert done.returncode == 0 and only_trace(tmp_path).totals.calls == 8, done.stderr
    assert done.stderr.count("Files written") == 1


def test_a_folder_that_cannot_be_written_is_told_before_the_program_starts(tmp_path: Path) -> None:
    write(tmp_path, "print('started')\n")
    (tmp_path / "runs").write_text("a file")
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (OutputError.exit_code, "") and "is a file" in done.stderr


def test_a_folder_that_vanishes_takes_nothing_from_the_program(tmp_path: Path, fork_run: Run) -> None:
    write(
        tmp_path,
        MODEL,
        "import shutil; model(ids); shutil.rmtree('runs'); open('runs', 'w'); model(ids)\nexit(4)\n",
    )
    done = fork_run(tmp_path)
    assert done.returncode == 4 and "moe-trace: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "import torch; torch.nn.Linear(2, 2)(torch.ones(1, 2)); exit(6)",
            "called no model with MoE routers",
        ),
        ("exit(6)", "did not import torch"),
    ],
)
def test_nothing_to_record_is_said_and_leaves_no_folder_and_the_status(
    tmp_path: Path, text: str, words: str
) -> None:
    write(tmp_path, text)
    done = run(tmp_path)
    assert done.returncode == 6 and words in done.stderr and not (tmp_path / "runs").exists()


def test_steps_that_never_came_are_said_with_the_last_one(tmp_path: Path, fork_run: Run) -> None:
    write(tmp_path, MODEL, "model(ids); exit(6)\n")
    done = fork_run(tmp_path, "--steps", "10-12")
    assert done.returncode == 6 and "ended in step 0" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mode", "train", "train.py"), "--mode is of a model that moe-trace runs"),
        (("missing.py",), "found no file missing.py"),
        (("--steps", "3-5", "--warmup", "1", "train.py"), "leave out --warmup"),
        (("--steps", "5-3", "train.py"), "comes before"),
        (("-m", "torch.distributed.run", "train.py"), "torchrun [options] -m moe_trace run"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    write(tmp_path, "print('started')")
    done = python(tmp_path, "-m", "moe_trace", "run", *options)
    assert done.returncode == UsageError.exit_code and words in done.stderr and not done.stdout


def test_two_processes_under_torchrun(tmp_path: Path) -> None:
    """A trace for each rank, under a name of its own, in one folder; the program's group is its own."""
    write(
        tmp_path,
        """
        import torch, torch.distributed as dist
        from moe_trace.demo import load_demo_model

        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(load_demo_model()[0].train())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            ids = torch.randint(3, 250, (1, 8))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        dist.destroy_process_group()
        """,
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = python(tmp_path, *torchrun, "-m", "moe_trace", "run", "--steps", "1-2", "train.py")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "moe_trace_runs").iterdir()
    found = sorted(folder.glob("*.pt.trace.json.gz"), key=lambda p: re.findall(r"rank(\d)", p.name))
    assert [re.findall(r"rank(\d)", trace.name) for trace in found] == [["0"], ["1"]]
    for rank, trace in enumerate(found):
        recording = moe_trace.read_recording(trace)
        assert (recording.rank, recording.world_size, len(recording.samples)) == (rank, 2, 2 * 4)
    assert read_summary(folder).totals.calls == 2 * 2 * 4
    assert done.stderr.count("Files written") == 1
