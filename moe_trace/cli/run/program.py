"""`moe-trace run SCRIPT`: the options for a user's program, and the report after it has ended."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from moe_trace.cli.pipes import prepare_streams, restore_streams
from moe_trace.data.errors import ProgramInterrupted, UsageError
from moe_trace.workload.config import RunConfig, Split
from moe_trace.workload.program.as_main import INTERRUPTED, Program
from moe_trace.workload.program.run import has_store, run_program

SCRIPT_STEPS = 32
_PROGRAM_OPTIONS = (
    "steps",
    "warmup",
    "layers",
    "every",
    "routes",
    "record_shapes",
    "with_stack",
    "out",
    "force",
)


def record_program(program: Program, values: dict[str, Any]) -> int:
    """Run a program with the given options. Our own output goes to stderr, since stdout is the program's.

    Raises:
        ProgramInterrupted: the program was interrupted by Ctrl-C.
    """
    config = _config(program, values)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences a line at each start and stop of a profiler
    new_folders = [folder for folder in (config.out, *config.out.parents) if not folder.exists()]
    restore_streams()
    try:
        run = run_program(program, config)
    finally:
        prepare_streams()
        for folder in new_folders:
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()
    with suppress(OSError, ValueError), redirect_stdout(_OwnOutputToStderr()):  # the stream may be closed
        if os.environ.get("RANK", "0") == "0":
            _report(run)
    if run.status == INTERRUPTED:
        raise ProgramInterrupted
    return run.status


class _OwnOutputToStderr:
    """Stdout that sends the text of the thread that created it to stderr, other threads' text to stdout."""

    def __init__(self) -> None:
        self._stdout, self._thread = sys.stdout, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr if threading.get_ident() == self._thread else self._stdout, name)


def _report(run: Any) -> None:
    own_traces = [trace for trace in run.traces if trace.parent == run.out.absolute()]
    if not run.traces:
        print(f"moe-trace: {run.why_nothing}")
        return
    if own_traces and not run.own_profiler:
        from moe_trace.read.reader import read_summary
        from moe_trace.show.text import render_text

        print(render_text(read_summary(own_traces[-1])))
    print_files((*run.files, *(trace for trace in run.traces if trace not in own_traces)))
    print_next(run.out if own_traces else run.traces[-1], run.traces[-1])


def _config(program: Program, values: dict[str, Any]) -> RunConfig:
    """Return the configuration of the recording.

    Raises:
        UsageError: an option applies only to a model that moe_trace runs itself.
    """
    defaults, split = RunConfig(), Split()
    for name, value in values.items():
        default = getattr(split, name) if hasattr(split, name) else getattr(defaults, name)
        if name not in _PROGRAM_OPTIONS and value != default:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is of a model that moe-trace runs; {program.target} brings its own")
    settle_steps(values, SCRIPT_STEPS, 0)
    chosen = {name: values[name] for name in _PROGRAM_OPTIONS}
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or has_store()  # which shares rank 0's folder
    out = values["out"] or new_folder(program.name, "script", alone=alone)
    chosen["out"] = Path(os.path.abspath(out))  # the program may change its working directory
    return RunConfig(**chosen)


def parse_steps(text: str) -> int | range:
    """Parse a number (`8`) or an inclusive range (`10-12`, three steps)."""
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a number, or a first and a last step, found {text}")
    if not dash:
        return int(first)
    if int(last) < int(first):
        raise argparse.ArgumentTypeError(f"{text}: the last step comes before the first")
    return range(int(first), int(last) + 1)


def parse_routes(text: str) -> Path:
    """Parse the file for routes. Text without the extension is taken for the program's name and rejected."""
    if not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(
            f"expected a file that ends in .npz, found {text}; to record beside the trace put another option "
            f"between, or -- : --routes -- {text}"
        )
    return Path(text)


def settle_steps(values: dict[str, Any], steps: int, warmup: int) -> None:
    """Replace `steps` and `warmup` in `values` by numbers.

    Raises:
        UsageError: both options define where the recording begins.
    """
    if isinstance(values["steps"], range):
        if values["warmup"] is not None:
            raise UsageError("--steps A-B says what comes before; leave out --warmup")
        values["warmup"], values["steps"] = values["steps"].start, len(values["steps"])
    values["steps"] = steps if values["steps"] is None else values["steps"]
    values["warmup"] = warmup if values["warmup"] is None else values["warmup"]


def new_folder(model: str, mode: str, *, alone: bool) -> Path:
    """Return an unused path such as `moe_trace_runs/demo-prefill-20260131-235959`, or with `-2` at the end.

    Args:
        alone: no other process must choose the same folder; without it, the parent of all runs is returned.
    """
    parent = RunConfig().out
    if not alone:
        return parent  # the clocks of other processes may differ
    name = re.sub(r"[^\w.-]+", "-", Path(model).stem if model.endswith(".json") else model.rstrip("/"))
    stem = f"{name[-40:].strip('-.')}-{mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


def print_files(files: tuple[Path, ...]) -> None:
    """Print the files written, with their sizes."""
    print("Files written")
    for file in files:
        print(f"  {file}  ({os.path.getsize(file) / 1024:,.0f} KiB)")


def print_next(folder: Path, trace: Path) -> None:
    """Print suggested next commands."""
    print("\nNext")
    quoted = shlex.quote(str(folder))
    print(f"  moe-trace ask {quoted}           # what to look at, and what to try")
    print(f"  moe-trace report {quoted}        # where the time goes, and findings")
    print(f"  moe-trace view {quoted}          # in TensorBoard")
    print(f"  moe-trace diff {quoted} OTHER    # what another run changed")
    print(f"  open {trace} in Perfetto")
