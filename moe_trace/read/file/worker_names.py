"""Derive ranks from vLLM's trace file names, for recordings without rank information.

    worker          [prefix_]dp0_pp0_tp1_dcp0_ep1_rank1.<ns>.pt.trace.json.gz  (get_worker_rank_suffix)
    older releases  <instance>-rank-1.<ns>.pt.trace.json.gz
    the server      [prefix_]<host>_<pid>.async_llm.<ns>.pt.trace.json.gz: the frontend, where no model runs

`rank` counts within one engine, and each data-parallel engine starts at 0, so the global rank is computed
from the index in each dimension, outermost first: data, pipeline, tensor (decode context parallelism
subdivides the tensor-parallel ranks). The folder's other traces have the sizes of the dimensions.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_trace.data.schema import Parallel, Recording

_ENDING = r"\.\d+\.pt\.trace\.json"
"""Ending of the name; suffixes of compressed files and of reduced traces may follow."""
_WORKER = re.compile(rf"(?P<run>(?:.*_)?)(?P<place>dp\d+_pp\d+_tp\d+(?:_[a-z]+\d+)*){_ENDING}.*")
_OLDER_NAME = re.compile(rf"(?P<run>.+)-(?P<place>rank-\d+){_ENDING}.*")
_PART = re.compile(r"([a-z]+)-?(\d+)")
_FRONTEND = re.compile(rf".*\.async_llm{_ENDING}(\.gz)?")

_DIMS = ("dp", "pp", "tp")
"""Dimensions from outermost to innermost; ranks adjacent in the last have consecutive numbers."""
_RANKS_MAX = 2**14
"""Maximum number of ranks in a run; larger indices are not ranks."""


@dataclass(frozen=True)
class Worker:
    """One process of an engine, parsed from the name of its trace."""

    run: str
    """Prefix before the place, the same for all processes of a run."""
    place: dict[str, int]
    """Index by dimension, such as `{"dp": 0, "pp": 0, "tp": 1, "rank": 1}`."""


def worker_of(name: str) -> Worker | None:
    """Parse a file name, or return None if it has another form."""
    match = _WORKER.fullmatch(name) or _OLDER_NAME.fullmatch(name)
    if match is None:
        return None
    place = {dim: int(index) for dim, index in _PART.findall(match["place"])}
    return Worker(match["run"], place) if max(place.values()) < _RANKS_MAX else None


def is_frontend(name: str) -> bool:
    """Return whether the trace is from vLLM's server process."""
    return _FRONTEND.fullmatch(name) is not None


def frontends_beside(files: Iterable[Path]) -> list[str]:
    """Return a note on frontends' traces in the folders of these files, which need not be read."""
    folders = dict.fromkeys(file.parent for file in files)
    count = sum(is_frontend(name) for folder in folders for name in _names(folder))
    if not count:
        return []
    traces, are = ("trace", "is") if count == 1 else ("traces", "are")
    return [f"{count} {traces} beside these {are} of vLLM's frontend (async_llm), in which no model runs"]


def with_rank_of_name(recording: Recording, path: Path) -> Recording:
    """Add rank information from file names to a recording that has none."""
    if recording.parallel is not None or recording.world_size > 1:
        return recording
    own = worker_of(path.name)
    if own is None:
        return recording
    others = (worker_of(name) for name in _names(path.parent))
    places = [own.place, *(other.place for other in others if other is not None and other.run == own.run)]
    dims = [dim for dim in _DIMS if dim in own.place]
    if not dims:
        rank = own.place["rank"]
        return replace(recording, rank=rank, world_size=1 + max(place.get("rank", 0) for place in places))
    sizes = {dim: 1 + max(place.get(dim, 0) for place in places) for dim in dims}
    if not 2 <= math.prod(sizes.values()) <= _RANKS_MAX:
        return recording
    ranks = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    return replace(
        recording,
        rank=int(ranks[tuple(own.place[dim] for dim in dims)]),
        world_size=ranks.size,
        parallel=_parallel(recording, own.place, sizes, ranks),
    )


def _parallel(
    recording: Recording, place: dict[str, int], sizes: dict[str, int], ranks: npt.NDArray[np.int64]
) -> Parallel:
    """Apply the engine's rules: tensor-parallel ranks route the same tokens, and experts, if split, are split
    over all ranks of a pipeline stage in order of rank."""

    def along(*free: str) -> tuple[int, ...]:
        """Return the ranks that differ from this place only in these dimensions, ascending."""
        return tuple(
            ranks[tuple(slice(None) if dim in free else place[dim] for dim in sizes)].ravel().tolist()
        )

    split = any(router.held_experts is not None for router in recording.routers)
    stage = along("dp", "tp")
    mesh = {dim: size for dim, size in sizes.items() if size > 1}
    return Parallel(
        mesh={**mesh, **({"ep": len(stage)} if split else {})},
        token_ranks=along("tp"),
        expert_ranks=stage if split else (),
        expert_exchange=("all_to_all" if sizes["dp"] > 1 else "all_reduce") if split else None,
    )


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
