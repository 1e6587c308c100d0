"""Select the traces of a run's ranks that can be merged, and align their clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_trace.data.errors import OutputError, SchemaError, TraceFileError, UsageError
from moe_trace.data.schema import Recording
from moe_trace.data.trace_json.kernels import find_kernels
from moe_trace.read.file.folder import find_traces
from moe_trace.read.file.opening import Progress
from moe_trace.read.file.rank_parts import Alignment
from moe_trace.read.file.trace_file import read_rank_recordings, read_trace
from moe_trace.read.ranks.align import align
from moe_trace.read.ranks.same_run import first_difference
from moe_trace.read.ranks.shared_calls import RankCalls, match_calls, rank_calls


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """One rank's trace, without its events."""

    path: Path
    recording: Recording
    calls: RankCalls = field(repr=False)
    head: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Traces to merge, with their alignment."""

    ranks: tuple[RankTrace, ...]
    """Traces by rank, ascending."""
    base_time_ns: int
    """Time origin of the merged trace, the earliest of the ranks'."""
    alignment: Alignment
    missing: tuple[int, ...]
    left_out: dict[str, str]
    """Reason for each file that cannot be read."""

    def shift_ns(self, rank: RankTrace) -> int:
        """Return the offset that is added to the rank's times."""
        base = rank.calls.base_time_ns - self.base_time_ns
        return base + self.alignment.offset_ns[rank.calls.rank]


def plan_merge(paths: Sequence[str | Path], out: Path, progress: Progress | None = None) -> MergePlan:
    """Read what the merge requires from every trace, one after another.

    Raises:
        UsageError: There are fewer than two ranks, one rank twice, or an already merged trace.
        SchemaError: A trace has a schema version that this release does not know.
        TraceFileError: The traces are of different models, or none can be read.
    """
    traces, left_out = [], {}
    for path in _files(paths, out):
        try:
            trace = _read(path, progress)
        except SchemaError:
            raise
        except TraceFileError as error:
            left_out[path.name] = str(error).removeprefix(f"{path}: ")
            continue
        if trace is not None:
            traces.append(trace)
        elif path in map(Path, paths):
            raise UsageError(f"{path} holds several ranks already; give the traces that the ranks wrote")
    ranks = tuple(sorted(traces, key=lambda trace: trace.calls.rank))
    _check_ranks(ranks, left_out)
    calls = [trace.calls for trace in ranks]
    present = {rank_calls.rank for rank_calls in calls}
    world_size = max(trace.recording.world_size for trace in ranks)
    return MergePlan(
        ranks=ranks,
        base_time_ns=min(rank_calls.base_time_ns for rank_calls in calls),
        alignment=align(calls, *match_calls(calls)),
        missing=tuple(rank for rank in range(world_size) if rank not in present),
        left_out=left_out,
    )


def _files(paths: Sequence[str | Path], out: Path) -> list[Path]:
    """Return the traces in the folders and files, except the output file."""
    files = [file for path in paths for file in find_traces(path)]
    target = out.resolve()
    for file in files:
        if file.resolve() == target and _is_of_one_rank(file):
            raise OutputError(f"{out} is one of the traces to be merged; choose another name for --out")
    return [file for file in dict.fromkeys(files) if file.resolve() != target]


def _is_of_one_rank(path: Path) -> bool:
    """Return False for the output of an earlier merge, which may be replaced."""
    try:
        return not read_rank_recordings(path)[1]
    except TraceFileError:
        return False


def _read(path: Path, progress: Progress | None) -> RankTrace | None:
    """Read one rank's trace, or return None for a merged trace."""
    trace = read_trace(path, progress)
    if trace.merged is not None:
        return None
    return RankTrace(
        path=path,
        recording=trace.recording,
        calls=rank_calls(trace, find_kernels(trace.events)),
        head=dict(trace.head),
    )


def _check_ranks(ranks: Sequence[RankTrace], left_out: dict[str, str]) -> None:
    if not ranks and left_out:
        file, reason = next(iter(left_out.items()))
        raise TraceFileError(f"{file}: {reason}")
    by_rank: dict[int, RankTrace] = {}
    for trace in ranks:
        other = by_rank.setdefault(trace.calls.rank, trace)
        if other is not trace:
            raise UsageError(
                f"found rank {trace.calls.rank} twice, in {other.path} and {trace.path}, expected one trace "
                "a rank; name the files of one run and one profiling cycle"
            )
    if len(ranks) < 2:
        unread = "".join(f"\n{file} was left out: {reason}" for file, reason in left_out.items())
        raise UsageError(
            f"found {len(ranks)} trace of one rank, expected those of two ranks or more; give the folder "
            f"that all ranks wrote to, or each rank's file{unread}"
        )
    found = first_difference([trace.recording for trace in ranks])
    if found is not None:
        first, second, different = found
        raise TraceFileError(
            f"{ranks[first].path} and {ranks[second].path} are not of one run ({different}); "
            "merge traces of one run"
        )
