"""Standard streams and pipes of a command: piped inputs, closed or full outputs, non-Unicode encodings."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from moe_trace.data.errors import MoETraceError, TraceFileError, UsageError

STANDARD_INPUT = "-"
TRACE = ".pt.trace.json"
_ESCAPES = "moe_trace_escapes"


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Encode a character as `\\uXXXX`, valid in JSON; bytes of a name that is not UTF-8 become `\\udcXX`."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = zip(units[::2], units[1::2], strict=True)
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in pairs), error.end


codecs.register_error(_ESCAPES, _escape)


_plain: dict[str, str] = {}
"""Error handlers of the streams before `prepare_streams` replaced them, by name of the stream."""


def restore_streams() -> None:
    """Undo `prepare_streams` before a program of the user runs."""
    for name, errors in _plain.items():
        getattr(sys, name).reconfigure(errors=errors)


def prepare_streams() -> None:
    """Make standard output and error accept any text. Text written to a closed stream is discarded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            _plain.setdefault(name, stream.errors or "strict")
            stream.reconfigure(errors=_ESCAPES)


def abandon_stdout() -> None:
    """Keep the interpreter from flushing the remaining output to a stream that failed."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def seekable_inputs(arguments: argparse.Namespace, reads: Mapping[str, str]) -> Iterator[None]:
    """Copy pipes and standard input (`-`) to temporary files, since a trace is read more than once.

    Args:
        arguments: inputs are replaced by their copies; `copies` maps each to the name that the user gave.
        reads: name of each argument that names inputs -> file extension of the copy.

    Raises:
        MoETraceError: an input cannot be read, or the command fails; names are those that the user gave.
    """
    copies = arguments.copies = dict[str, str]()
    with ExitStack() as stack:

        @cache
        def folder() -> str:
            import tempfile  # its imports take longer than most commands take to start

            return stack.enter_context(tempfile.TemporaryDirectory(prefix="moe_trace-"))

        def copied(given: Any, ending: str) -> Any:
            if isinstance(given, list):
                return [copied(item, ending) for item in given]
            if given is None or not (str(given) == STANDARD_INPUT or _is_pipe(given)):
                return given
            if str(given) in copies.values():
                raise UsageError(f"{given} can be read once, and stands for two inputs; save it to a file")
            target = Path(folder(), str(len(copies)), _name(given) + ending)
            copies[str(target)] = str(given)
            _copy(str(given), target)
            return type(given)(target)

        for name in filter(vars(arguments).__contains__, reads):
            setattr(arguments, name, copied(getattr(arguments, name), reads[name]))
        try:
            yield
        except MoETraceError as error:
            for copy, given in copies.items():
                error.args = tuple(str(text).replace(copy, given) for text in error.args)
            raise


def _name(given: str | Path) -> str:
    return "stdin" if str(given) == STANDARD_INPUT else f"pipe{Path(given).name}"


def _copy(given: str, target: Path) -> None:
    import shutil

    target.parent.mkdir()
    try:
        source = sys.stdin.buffer if given == STANDARD_INPUT else open(given, "rb")  # noqa: SIM115
        with source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
    except (OSError, AttributeError) as error:
        raise TraceFileError(f"{given}: cannot be read ({error}); give a file or a pipe with one") from error


def _is_pipe(path: str | Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False  # the command that reads it reports the error
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)
