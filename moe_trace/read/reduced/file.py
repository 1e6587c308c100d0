"""Reduced traces: small files beside a trace with everything that reports require, but no events.

The name is `<trace's name>.<digest of the trace>.moe_trace`, so that a file from an older trace of that name
is never used. The content is JSON, compressed with gzip. `VERSION` increases whenever the same trace would be
reduced to something else.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moe_trace.data.calls.table import rows_in
from moe_trace.data.codec import decode_recording, encode_recording
from moe_trace.data.display.json import attributes
from moe_trace.data.errors import TraceFileError
from moe_trace.data.files import whole_file
from moe_trace.data.schema import Stage
from moe_trace.data.trace_json.coverage import TimeCoverage
from moe_trace.read.file.folder import REDUCED_SUFFIX
from moe_trace.read.file.rank_parts import Alignment
from moe_trace.read.file.trace_file import decode_payload
from moe_trace.read.ranks.inputs import call_numbers
from moe_trace.read.ranks.shared_calls import RankCalls
from moe_trace.read.reduced.trace import ReducedTrace, with_call_numbers
from moe_trace.read.time.outside_moe import TraceTotals, TraceWork
from moe_trace.read.time.phase_detection import PHASES
from moe_trace.read.time.phases import CALL_COLUMNS, CallTimes, IntArray, Times

VERSION = 1
_NAME = re.compile(r"(?P<trace>.+)\.(?P<digest>[0-9a-f]{16})" + re.escape(REDUCED_SUFFIX), re.DOTALL)
_COPIED_FIELDS = (
    "devices",
    "operators",
    "unreadable",
    "processes",
    "calls",
    "step_us",
    "window_us",
    "alignment",
    "notes",
)
"""Fields of a `ReducedTrace` that are written without conversion."""


class _Part(msgspec.Struct, kw_only=True):
    """One `ReducedTrace`; calls are identified by their row in the recording."""

    recording: msgspec.Raw
    timed: IntArray
    forward: Times
    backward: Times | None
    columns: dict[str, IntArray]
    on_device: bool
    coverage: TimeCoverage
    busy_us: list[tuple[int, float]]
    work: TraceTotals
    work_parts: list[tuple[int, Stage, TraceTotals]]
    work_calls: list[tuple[int, Stage]]
    devices: tuple[str, ...]
    operators: frozenset[str]
    unreadable: int
    processes: int
    calls: RankCalls
    step_us: dict[int, float]
    window_us: float
    alignment: Alignment | None
    notes: tuple[str, ...]


class _Head(msgspec.Struct):
    version: int


class _Content(msgspec.Struct):
    version: int
    parts: list[_Part]


def encode(parts: Sequence[ReducedTrace]) -> bytes:
    """Encode the ranks of one trace, of which there is mostly one, as JSON."""
    content = _Content(VERSION, [_encode(part) for part in parts])
    return msgspec.json.encode(content, enc_hook=np.ndarray.tolist)


def decode(text: bytes, path: Path) -> list[ReducedTrace]:
    """Decode the output of `encode`, and attribute it to the trace at `path`.

    Raises:
        TraceFileError: The JSON has another version or form.
    """
    try:
        version = msgspec.json.decode(text, type=_Head).version
        if version != VERSION:
            raise TraceFileError(
                f"found a reduced trace of version {version}, expected {VERSION}; reduce the trace again "
                "(moe-trace reduce), or read it with the release that wrote it"
            )
        content = msgspec.json.decode(text, type=_Content, dec_hook=_array)
        return [_decode(part, path) for part in content.parts]
    except (msgspec.DecodeError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise TraceFileError(
            f"found no reduced trace ({error}); the file was changed after it was written, so reduce the "
            "trace again"
        ) from error


def _encode(part: ReducedTrace) -> _Part:
    row = {key: i for i, key in enumerate(part.recording.calls.call_keys())}
    times = part.times
    return _Part(
        recording=msgspec.Raw(encode_recording(with_call_numbers(part.recording, part.own_numbers))),
        timed=rows_in(times.samples, part.recording.calls),
        forward=times.forward,
        backward=times.backward,
        columns=attributes(times, *CALL_COLUMNS),
        on_device=times.on_device,
        coverage=times.coverage,
        busy_us=[(row[key], us) for key, us in part.busy_us.items()],
        work=part.work.whole,
        work_parts=[(*key, found) for key, found in part.work.parts.items()],
        work_calls=sorted(part.work.calls),
        **attributes(part, *_COPIED_FIELDS),
    )


def _decode(part: _Part, path: Path) -> ReducedTrace:
    recording = decode_recording(decode_payload(bytes(part.recording)))
    own_numbers = recording.calls.call
    recording = with_call_numbers(recording, call_numbers(recording, {}))
    keys, timed = recording.calls.call_keys(), len(part.timed)
    times = CallTimes(
        samples=recording.calls.take(part.timed),
        forward=_reshape_to_phases(part.forward, timed),
        backward=None if part.backward is None else _reshape_to_phases(part.backward, timed),
        on_device=part.on_device,
        coverage=part.coverage,
        **{name: part.columns[name].reshape(timed) for name in CALL_COLUMNS},
    )
    return ReducedTrace(
        path=path,
        recording=recording,
        own_numbers=own_numbers,
        times=times,
        busy_us={keys[row]: us for row, us in part.busy_us},
        work=TraceWork(
            part.work,
            {(step, stage): found for step, stage, found in part.work_parts},
            frozenset(part.work_calls),
        ),
        **attributes(part, *_COPIED_FIELDS),
    )


def _reshape_to_phases(times: Times, calls: int) -> Times:
    names = Times.__dataclass_fields__
    return Times(**{name: getattr(times, name).reshape(calls, len(PHASES)) for name in names})


def _array(_: type, value: Any) -> np.ndarray:
    return np.array(value, np.int64)


# -- files ------------------------------------------------------------------------------------------------


def is_reduced(path: Path) -> bool:
    """Return whether a file is a reduced trace, by its name."""
    return path.name.endswith(REDUCED_SUFFIX)


def trace_of(path: Path) -> Path:
    """Return the path of the original trace, which need not exist any more."""
    match = _NAME.fullmatch(path.name)
    return path.with_name(match["trace"]) if match else path


def digest_of(trace: Path) -> str:
    """Return 16 hex digits of the SHA-256 of the trace's bytes.

    Raises:
        OSError: The file cannot be read.
    """
    import hashlib  # imported here, since it loads OpenSSL

    with trace.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def reduced_path(trace: Path) -> Path:
    """Return the path of the reduced form for the trace's current contents."""
    return trace.with_name(f"{trace.name}.{digest_of(trace)}{REDUCED_SUFFIX}")


def write_reduced(trace: Path, text: bytes) -> Path:
    """Write the output of `encode`, and remove reduced forms of older traces of that name.

    Raises:
        OutputError: The folder cannot be written.
    """
    target = reduced_path(trace)
    with whole_file(target) as temporary:
        temporary.write_bytes(gzip.compress(text, compresslevel=6, mtime=0))
    for other in trace.parent.iterdir():
        if is_reduced(other) and other != target and trace_of(other) == trace:
            other.unlink(missing_ok=True)
    return target


def read_reduced(path: Path) -> list[ReducedTrace]:
    """Read a reduced trace.

    Raises:
        TraceFileError: The file cannot be read.
    """
    try:
        return decode(gzip.decompress(path.read_bytes()), trace_of(path))
    except (OSError, EOFError, zlib.error) as error:
        raise TraceFileError(f"{path}: cannot be read ({error}); reduce its trace again") from error
    except TraceFileError as error:
        raise type(error)(f"{path}: {error}") from error
