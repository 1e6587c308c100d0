"""Reduce many traces with as many processes as cores; each returns the contents of the reduced file.

The processes are plain children that run one module: unlike `multiprocessing`, they neither copy the threads
of the caller nor run its script again.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moe_trace.data.errors import MoETraceError, OutputError, TraceFileError
from moe_trace.read.reduced.file import encode, write_reduced
from moe_trace.read.reduced.trace import reduce_file

if TYPE_CHECKING:
    import subprocess

SHARE_BYTES = 4 * 2**20
"""Minimum number of compressed bytes per process, which takes a fraction of that time to start."""
_COMPRESSION_RATIO = 10
"""Size ratio of uncompressed to compressed traces."""


def worth(files: Sequence[Path]) -> int:
    """Return the number of processes worth using; 1 means this process alone."""
    size = sum(_packed_bytes(file) for file in files)
    return max(1, min(len(files), _cores(), size // SHARE_BYTES)) if sys.executable else 1


def _packed_bytes(file: Path) -> int:
    try:
        size = file.stat().st_size
    except OSError:
        return 0
    return size if file.name.endswith(".gz") else size // _COMPRESSION_RATIO


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reduce_trace(file: Path) -> Path:
    """Write the reduced form of one trace in this process, and return its path.

    Raises:
        TraceFileError: The trace cannot be read.
        OutputError: Its folder cannot be written.
    """
    return write_reduced(file, encode(list(reduce_file(file))))


def reduce_traces(files: Sequence[Path]) -> Iterator[Path | MoETraceError]:
    """Write the reduced form of each trace, using all cores; yield its path, or the error."""
    regular = [file for file in files if not os.path.exists(file) or os.path.isfile(file)]
    texts = reduce_files(regular, worth(regular))
    for file in files:
        refused = TraceFileError(f"{file}: no regular file, beside which one could stand; give a trace")
        text = next(texts) if file in regular else refused
        try:
            yield text if isinstance(text, TraceFileError) else write_reduced(file, text)
        except OutputError as error:
            yield error


def reduce_files(files: Sequence[Path], processes: int) -> Iterator[bytes | TraceFileError]:
    """Yield the encoded reduction of each file, or the error that prevents it, in the order of the files."""
    from concurrent.futures import ThreadPoolExecutor  # only needed for many traces, like subprocess below

    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for _ in range(processes):
        idle.put(_Worker())

    def ask(file: Path) -> bytes | TraceFileError:
        worker = idle.get()
        try:
            return worker.ask(file)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(processes)
    try:
        yield from pool.map(ask, files)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for _ in range(processes):
            idle.get().end()


class _Worker:
    """A child process, started on first use and again if it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, file: Path) -> bytes | TraceFileError:
        if self._process is None:
            self._process = _start()
        into, out = self._process.stdin, self._process.stdout
        assert into is not None and out is not None
        try:
            pickle.dump(file, into)
            into.flush()
            answer: bytes | TraceFileError = pickle.load(out)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            code = self.end()
            return TraceFileError(
                f"{file}: the process that read it ended with {code}; it may have run out of memory"
            )
        return answer

    def end(self) -> int:
        """End the process and return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        process.terminate()
        return process.wait()


def _start() -> subprocess.Popen[bytes]:
    import subprocess

    # What this process can import, the child must be able to, as its path may have been changed by hand.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def serve() -> None:
    """Run the child's loop: read paths from stdin and answer each, until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing that prints gets between the answers
    with suppress(EOFError):
        while True:
            file = pickle.load(sys.stdin.buffer)
            try:
                answer: bytes | TraceFileError = encode(list(reduce_file(file)))
            except TraceFileError as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
