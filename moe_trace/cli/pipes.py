"""The ends of a command: it may read from a pipe, and write to what is closed, full, or knows no Unicode."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moe_trace.data.errors import TraceFileError

if TYPE_CHECKING:
    from rich.console import Console

_PATHS = ("paths", "path", "a", "b")
"""Arguments of the commands that name what is read."""
STANDARD_INPUT = "-"
WIDTH = 80
"""Of a console where nobody watches."""
_ESCAPES = "moe_trace_escapes"


def _escape(error: UnicodeError) -> tuple[str, int]:
    """`\\uXXXX`, which JSON and people read alike; bytes of a name that is no UTF-8 are `\\udcXX`."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = zip(units[::2], units[1::2], strict=True)
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in pairs), error.end


codecs.register_error(_ESCAPES, _escape)


def prepare_streams() -> None:
    """Have both streams take any text; what is written to a closed one is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)


def abandon_stdout() -> None:
    """Keep the interpreter from writing what is left to a stream that failed."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def console(stream: TextIO | None = None) -> Console:
    """A rich console; 80 columns and plain text unless the stream is a terminal."""
    from rich.console import Console

    stream = stream or sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, width=WIDTH, highlight=False, no_color=True, force_terminal=False)


@contextmanager
def seekable_inputs(arguments: argparse.Namespace) -> Iterator[None]:
    """Copy pipes and standard input (`-`) to files, for a trace is read from more than one place.

    Raises:
        TraceFileError: one cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="moe_trace-") as folder:
        for name in _PATHS:
            given = getattr(arguments, name, None)
            if isinstance(given, list):
                setattr(arguments, name, [_seekable(path, Path(folder), i) for i, path in enumerate(given)])
            elif isinstance(given, str):
                setattr(arguments, name, _seekable(given, Path(folder), _PATHS.index(name)))
        yield


def _seekable(path: str, folder: Path, number: int) -> str:
    if path != STANDARD_INPUT and not _is_pipe(path):
        return path
    copy = folder / str(number) / ("stdin.json" if path == STANDARD_INPUT else f"{Path(path).name}.json")
    copy.parent.mkdir(exist_ok=True)
    try:
        source = sys.stdin.buffer if path == STANDARD_INPUT else open(path, "rb")  # noqa: SIM115
        with source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    except (OSError, AttributeError) as error:
        raise TraceFileError(f"{path}: cannot be read ({error}); give a trace or a pipe with one") from error
    return str(copy)


def _is_pipe(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False  # who reads it says what is wrong
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)
