"""Atomic file output, and the error for a trace that cannot be opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_trace.data.errors import OutputError, TraceFileError


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes `target` on success and is removed on failure.

    The temporary file has the target's own name, in a hidden folder next to it: writers that store their path
    in the file then store the right name, and the final rename stays within one file system.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    import shutil
    import tempfile  # imports more than most commands need to start

    target = Path(os.path.realpath(target))  # keep a symbolic link
    folder = None
    try:
        special = target.exists() and not target.is_file()
        folder = Path(tempfile.mkdtemp(prefix=".moe_trace-", dir=None if special else target.parent))
        temporary = folder / target.name
        yield temporary
        if special:  # never replace a device or a pipe
            with temporary.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            return
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error}); nothing was left half-written. "
            "Free some space or choose another folder"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_text(target: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names can be invalid UTF-8


def trace_path_error(path: Path, error: OSError) -> TraceFileError:
    """Return the error for a trace that cannot be opened."""
    return TraceFileError(f"{path}: cannot be read ({error.strerror}); give the path of an existing trace")
