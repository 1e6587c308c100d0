"""Run programs in separate processes with torch and transformers already imported, which takes seconds.

The server (this file, run as a script) imports them once and forks for each program. The child has its own
arguments, folder and streams. It ends like any Python process, by exit status or signal, after its threads
and its exit handlers. The server imports nothing of moe_trace. Tests that concern the start of Python, the
import of torch or several processes must start a new process instead.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paths import ROOT

STREAMS = ("stdin", "stdout", "stderr")


class ForkServer:
    """Starts with the first program, and stays until `close`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, folder: Path, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """As `subprocess.run([sys.executable, *command], cwd=folder)`, in the environment of the tests."""
        with TemporaryDirectory() as streams:
            (Path(streams) / "stdin").write_text(stdin)
            server = self._started()
            assert server.stdin is not None and server.stdout is not None
            print(json.dumps([str(folder), command, streams]), file=server.stdin, flush=True)
            answer = server.stdout.readline()
            assert answer, "the server ended"
            out, err = ((Path(streams) / name).read_text() for name in STREAMS[1:])
        return subprocess.CompletedProcess([sys.executable, *command], int(answer), out, err)

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "KINETO_LOG_LEVEL": "6"},
                start_new_session=True,
            )
        return self._server

    def close(self) -> None:
        """End it, and what a test that ran out of time left below it."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()


def _next_program() -> tuple[str, list[str], str]:
    """Serves; returns in each child, with its folder, its command and where its streams are."""
    # Not by the streams of Python, which are the child's.
    asked, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nothing, number)
    with os.fdopen(asked) as requests:
        while line := requests.readline():
            if (child := os.fork()) == 0:
                os.close(answers)
                folder, command, streams = json.loads(line)
                return folder, command, streams
            _, status = os.waitpid(child, 0)
            os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(folder: str, command: Sequence[str], streams: str) -> None:
    for number, name in enumerate(STREAMS):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(f"{streams}/{name}", flags), number)
    os.chdir(folder)
    if command[0] == "-m":
        sys.argv, sys.path[0] = list(command[1:]), folder
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(command), str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


def _serve() -> None:
    import torch._dynamo
    import transformers
    from transformers.models.olmoe import modeling_olmoe

    imported: Any = (torch, transformers.PreTrainedTokenizerFast, modeling_olmoe)
    del imported
    assert "moe_trace" not in sys.modules
    gc.collect()
    gc.freeze()  # else a collection in a child would copy all memory that it shares with the server
    _run(*_next_program())


if __name__ == "__main__":
    _serve()
