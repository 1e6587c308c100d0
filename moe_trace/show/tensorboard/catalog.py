"""Catalog of the traces below the log folder. Requests name a run and a trace; only listed files are served.

Names from requests are looked up, never joined to a path, so no form of `..` can leave the folder. Links are
followed only if they stay below it.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

TRACE_NAME = re.compile(r"(?P<stem>.+)\.pt\.trace\.json(?:\.gz)?", re.DOTALL)
_REDUCED_NAME = re.compile(r"(?P<trace>.+\.pt\.trace\.json(?:\.gz)?)\.[0-9a-f]{16}\.moe_trace", re.DOTALL)
TRACES_MAX = 2000
FRESH_S, RECENT_S = 1.0, 30.0
_DUPLICATE = "another folder has a trace of that name; name the folders: --logdir_spec a:first,b:second"
OUTSIDE = "a link that leaves the log folder; it is not followed"


@dataclass(frozen=True)
class Trace:
    """A trace file as found by a scan of the folder."""

    run: str
    """Folder relative to the log folder, `.` for itself; with `--logdir_spec` below the folder's name."""
    name: str
    path: Path
    """The file, or the reduced file if the trace itself is missing."""
    root: Path
    """The log folder with links resolved; nothing outside it is read."""
    mtime_ns: int
    size_bytes: int

    @property
    def is_reduced(self) -> bool:
        """Whether only the reduced file exists, which has no events."""
        return TRACE_NAME.fullmatch(self.path.name) is None

    @property
    def key(self) -> tuple[str, int, int]:
        """Key that changes when the file changes."""
        return str(self.path), self.mtime_ns, self.size_bytes

    @property
    def label(self) -> str:
        """Name of the worker: the file's name without its extensions."""
        match = TRACE_NAME.fullmatch(self.name)
        return match["stem"] if match else self.name


@dataclass(frozen=True)
class Catalog:
    """The files found below the log folder."""

    traces: Mapping[tuple[str, str], Trace]
    """Mapping from (run, name) to trace, in sorted order."""
    refused: Mapping[tuple[str, str], str]
    """Mapping from (run, name) to the reason why the file is not served."""
    cut_off: bool
    """Whether there are more than `TRACES_MAX` files."""


class Catalogs:
    """Cache of the latest catalog. Imports only the standard library, so that it always works.

    Args:
        logdir: the option as TensorBoard received it; empty if it was not given.
        logdir_spec: likewise, in the form `name:folder,name:folder`.
    """

    def __init__(self, logdir: str, logdir_spec: str = "") -> None:
        self.logdir = logdir or logdir_spec
        self._roots = [("", logdir)] if logdir else _parse_spec(logdir_spec)
        self._lock = threading.Lock()
        self._latest: tuple[float, Catalog] | None = None

    def get(self, max_age_s: float) -> Catalog:
        """Return a catalog of at most that age, since scanning a large folder on a network takes time."""
        with self._lock:
            now = time.monotonic()
            if self._latest is None or now - self._latest[0] > max_age_s:
                found = [find_catalog(Path(folder), name) for name, folder in self._roots]
                self._latest = (now, _joined(found))
            return self._latest[1]

    def find(self, run: str, name: str) -> Trace:
        """Return a listed trace with the current state of its file.

        Raises:
            KeyError: no such trace is listed, or its file no longer exists.
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


def _parse_spec(spec: str) -> list[tuple[str, str]]:
    """Split `--logdir_spec` into (name, folder) pairs as TensorBoard does; the name may be empty."""
    found = []
    for part in filter(None, spec.split(",")):
        name, colon, folder = part.partition(":")
        named = colon and not part.startswith("/") and not folder.startswith("//")
        found.append((name, folder) if named else ("", part))
    return found


def _joined(catalogs: list[Catalog]) -> Catalog:
    if len(catalogs) == 1:
        return catalogs[0]
    traces: dict[tuple[str, str], Trace] = {}
    refused = {key: why for catalog in catalogs for key, why in catalog.refused.items()}
    for catalog in catalogs:
        refused |= dict.fromkeys(traces.keys() & catalog.traces.keys(), _DUPLICATE)
        traces = {**catalog.traces, **traces}
    return Catalog(dict(sorted(traces.items())), refused, any(catalog.cut_off for catalog in catalogs))


def as_text(name: str) -> str:
    """Return a name that JSON and URLs can carry, with bytes that are not UTF-8 as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find_catalog(logdir: Path, prefix: str = "") -> Catalog:
    """Scan the folder. Files that cannot be examined are left out or refused, never an error."""
    root = Path(os.path.realpath(os.path.expanduser(logdir)))
    traces: dict[tuple[str, str], Trace] = {}
    refused: dict[tuple[str, str], str] = {}
    for folder, file, path in _candidates(root):
        run, name = as_text(os.path.normpath(os.path.join(prefix, folder))), as_text(file)
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
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block for ever
            refused[run, name] = "no regular file; it is not read"
            continue
        found = Trace(run, name, path, root, status.st_mtime_ns, status.st_size)
        other = traces.get((run, name))  # a missing trace may have several reduced files
        if other is None or other.mtime_ns < found.mtime_ns:
            traces[run, name] = found
    return Catalog(dict(sorted(traces.items())), refused, False)


def is_below(path: Path, root: Path) -> bool:
    """Return whether a file, with links followed, lies below `root` (a real path)."""
    return Path(os.path.realpath(path)).is_relative_to(root)


def _candidates(root: Path) -> Iterator[tuple[str, str, Path]]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        run = Path(folder).relative_to(root).as_posix()
        for name in sorted(folders):
            path = Path(folder, name)
            if path.is_symlink() and not is_below(path, root):  # os.walk does not enter it: report it
                yield run, f"{name}/", path
        for name in sorted(files):
            if TRACE_NAME.fullmatch(name):
                yield run, name, Path(folder, name)
        for match in filter(None, map(_REDUCED_NAME.fullmatch, files)):
            if match["trace"] not in files:
                yield run, match["trace"], Path(folder, match.string)
