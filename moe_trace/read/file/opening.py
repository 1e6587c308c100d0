"""Open a trace on disk, plain or gzip, as a stream of JSON."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moe_trace.data.errors import TraceFileError
from moe_trace.data.files import trace_path_error
from moe_trace.data.trace_json.stream import JsonStream

Progress = Callable[[int, int], None]
"""Called with the bytes of the file read so far, and its size."""

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, eq=False)
class TraceSource:
    """A trace that is open."""

    raw: BinaryIO
    """The file itself."""
    plain: BinaryIO
    """The same, decompressed."""
    size: int


@contextmanager
def open_trace_stream(path: Path, progress: Progress | None = None) -> Iterator[JsonStream]:
    """A cursor over the trace's JSON.

    Raises:
        TraceFileError: the file cannot be opened or decompressed.
    """
    with opened(path) as source:
        yield JsonStream(counting(source, progress), str(path))


@contextmanager
def opened(path: Path) -> Iterator[TraceSource]:
    """The file, as it is and decompressed.

    Raises:
        TraceFileError: as `open_trace_stream`.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise trace_path_error(path, error) from error
    with raw:
        packed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        size = path.stat().st_size
        try:
            if packed:
                with gzip.open(raw, "rb") as plain:
                    yield TraceSource(raw, plain, size)  # type: ignore[arg-type]
            else:
                yield TraceSource(raw, raw, size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TraceFileError(
                f"{path}: the gzip data is broken ({error}); the file is truncated or was changed - "
                "export it again"
            ) from error
        except OSError as error:
            raise trace_path_error(path, error) from error


def counting(source: TraceSource, progress: Progress | None) -> Callable[[int], bytes]:
    """Reads the decompressed file, and tells how far it has come."""
    if progress is None:
        return source.plain.read

    def read(size: int) -> bytes:
        block = source.plain.read(size)
        progress(source.raw.tell(), source.size)
        return block

    return read
