"""Which traces lie below the log folder. Requests name a run and a trace; only what is listed here is served.

A name from a request is looked up, never joined to a path, so no form of `..` can leave the folder. Links are
followed only where they stay below it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

TRACE_NAME = re.compile(r"(?P<stem>.+)\.pt\.trace\.json(?:\.gz)?", re.DOTALL)
TRACES_MAX = 2000
FRESH_S, RECENT_S = 1.0, 30.0
OUTSIDE = "a link that leaves the log folder; it is not followed"


@dataclass(frozen=True)
class Trace:
    """One trace file, as it was when the folder was looked through."""

    run: str
    """Folder relative to the log folder; `.` for itself."""
    name: str
    path: Path
    mtime_ns: int
    size_bytes: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Changes when the file does."""
        return str(self.path), self.mtime_ns, self.size_bytes

    @property
    def label(self) -> str:
        """The worker's name: the file's, without its endings."""
        match = TRACE_NAME.fullmatch(self.name)
        return match["stem"] if match else self.name


@dataclass(frozen=True)
class Catalog:
    """What was found below the log folder."""

    traces: Mapping[tuple[str, str], Trace]
    """By (run, name), runs and names in order."""
    refused: Mapping[tuple[str, str], str]
    """(run, name) -> why it is not served."""
    cut_off: bool
    """Whether there are more than `TRACES_MAX` files."""


class Catalogs:
    """The latest look at the log folder. Imports only the standard library, so that it always works.

    Args:
        logdir: as TensorBoard got it; empty where it was started without one.
    """

    def __init__(self, logdir: str) -> None:
        self.logdir = logdir
        self._lock = threading.Lock()
        self._latest: tuple[float, Catalog] | None = None

    def get(self, max_age_s: float) -> Catalog:
        """A catalog of at most that age: walking through a large folder on a network takes time."""
        with self._lock:
            now = time.monotonic()
            if self._latest is None or now - self._latest[0] > max_age_s:
                found = find_catalog(Path(self.logdir)) if self.logdir else Catalog({}, {}, False)
                self._latest = (now, found)
            return self._latest[1]

    def find(self, run: str, name: str) -> Trace:
        """The listed trace, as its file is now.

        Raises:
            KeyError: no such trace is listed, or its file is gone.
        """
        for max_age_s in (RECENT_S, FRESH_S):
            trace = self.get(max_age_s).traces.get((run, name))
            if trace is not None:
                try:
                    status = trace.path.stat()
                except OSError:
                    break
                return replace(trace, mtime_ns=status.st_mtime_ns, size_bytes=status.st_size)
        raise KeyError("trace of that name")


def find_catalog(logdir: Path) -> Catalog:
    """Look through the folder; what cannot be looked at is left out or refused, never an error."""
    root = Path(os.path.realpath(logdir))
    traces: dict[tuple[str, str], Trace] = {}
    refused: dict[tuple[str, str], str] = {}
    for run, name, path in _candidates(root):
        if len(traces) + len(refused) >= TRACES_MAX:
            return Catalog(traces, refused, True)
        if not is_below(path, root):
            refused[run, name] = OUTSIDE
            continue
        try:
            status = path.stat()
        except OSError as error:
            refused[run, name] = f"cannot be read ({error.strerror})"
            continue
        traces[run, name] = Trace(run, name, path, status.st_mtime_ns, status.st_size)
    return Catalog(dict(sorted(traces.items())), refused, False)


def is_below(path: Path, root: Path) -> bool:
    """Whether the file that the path leads to, links followed, lies below `root` (a real path)."""
    return Path(os.path.realpath(path)).is_relative_to(root)


def _candidates(root: Path) -> Iterator[tuple[str, str, Path]]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        run = Path(folder).relative_to(root).as_posix()
        for name in sorted(folders):
            path = Path(folder, name)
            if path.is_symlink() and not is_below(path, root):  # os.walk does not enter it: say so
                yield run, f"{name}/", path
        for name in sorted(files):
            if TRACE_NAME.fullmatch(name):
                yield run, name, Path(folder, name)
