"""Open a plain or gzip-compressed trace as a JSON stream."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_trace.data.errors import TraceFileError
from moe_trace.data.files import trace_path_error
from moe_trace.data.trace_json.stream import JsonStream

Progress = Callable[[int, int], None]
"""Callback with the number of bytes of the file read so far, and its size."""

_GZIP_MAGIC = b"\x1f\x8b"


@contextmanager
def open_trace_stream(path: Path, progress: Progress | None = None) -> Iterator[JsonStream]:
    """Open a cursor over the trace's JSON.

    Raises:
        TraceFileError: The file cannot be opened or decompressed.
    """
    with opened(path) as (raw, plain):
        size = path.stat().st_size

        def read(length: int) -> bytes:
            block = plain.read(length)
            if progress is not None:
                progress(raw.tell(), size)
            return block

        yield JsonStream(read, str(path))


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open the raw file and its decompressed contents, which are the same object if it is not compressed.

    Raises:
        TraceFileError: See `open_trace_stream`.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise trace_path_error(path, error) from error
    with raw:
        packed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        try:
            if packed:
                with gzip.open(raw, "rb") as plain:
                    yield raw, plain  # type: ignore[misc]
            else:
                yield raw, raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TraceFileError(
                f"{path}: the gzip data is broken ({error}); the file is truncated or was changed - "
                "export it again"
            ) from error
        except OSError as error:
            raise trace_path_error(path, error) from error
