"""`moe-trace run` in which rank 1 has a fault: `faulty_run.py FAULT run ARGUMENTS...`, under torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from moe_trace.cli import main
from moe_trace.workload import runner
from moe_trace.workload.process_group import Worker

LATE_S = 20.0


def out() -> str:
    return sys.argv[sys.argv.index("--out") + 1]


def note_that_it_records(run: Any) -> Any:
    """For rank 0, which has a trace to write from its first step on."""

    def noting(*arguments: Any) -> None:
        Path(f"{out()}.began").touch()
        run(*arguments)

    return noting


def die(*_: Any) -> None:
    while not Path(f"{out()}.began").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_: Any) -> None:
    raise RuntimeError("out of memory, says the fault of this test")


def late(worker: Worker, what: str, value: object) -> None:
    if what == "trace":
        time.sleep(LATE_S)
    worker.store.set(f"{what}/{worker.rank}", "null")


def lose(self: Any, *arguments: Any, **options: Any) -> None:
    """Says that it wrote a trace, and has removed it."""
    for trace in Path(out()).glob("*.rank1.*"):
        trace.unlink()


if __name__ == "__main__":
    fault = sys.argv[1]
    if os.environ["RANK"] == "1":
        if fault == "die":
            runner._run = die
        elif fault == "fail":
            make_step = runner.make_step
            runner.make_step = lambda *a, **k: make_step(*a, **k) and fail
        elif fault == "late":
            Worker.publish = late
        elif fault == "lose":
            tell = Worker.publish
            Worker.publish = lambda worker, what, value: (
                what == "trace" and lose(worker),
                tell(worker, what, value),
            )[1]
    elif fault == "die":
        runner._run = note_that_it_records(runner._run)
    sys.exit(main(sys.argv[2:]))
