"""Check whether recordings belong together: one model, one run, and no call twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moe_trace.data.schema import Recording, RouterInfo

MODEL_KEYS = ("class", "num_layers", "hidden_size", "dtype")


def first_difference(recordings: Sequence[Recording]) -> tuple[int, int, str] | None:
    """Return indices of two recordings of different runs and what differs, or None if all agree."""
    by_rank: dict[int, int] = {}
    for i, recording in enumerate(recordings):
        earlier = [0, by_rank.setdefault(recording.rank, i)]
        sharing = recording.parallel
        peers = set() if sharing is None else {*sharing.token_ranks, *sharing.expert_ranks}
        earlier += [by_rank[rank] for rank in sorted(peers) if rank in by_rank]
        for j in dict.fromkeys(earlier):
            different = difference(recordings[j], recording) if i != j else ""
            if different:
                return j, i, different
    return None


def difference(a: Recording, b: Recording) -> str:
    """Describe what shows that two recordings are of different runs, or return an empty string."""
    for key in MODEL_KEYS:
        if a.model.get(key) != b.model.get(key):
            return f"different models: {key} {a.model.get(key)!r} and {b.model.get(key)!r}"
    routers = {router.name: _shape(router) for router in a.routers}
    for router in b.routers:
        shape, other_shape = routers.get(router.name, _shape(router)), _shape(router)
        if shape != other_shape:
            return (
                f"different models: {router.name} has {shape[1]} experts, top {shape[2]}, "
                f"and {other_shape[1]}, top {other_shape[2]}"
            )
    if a.world_size != b.world_size:
        return f"runs of {a.world_size} and {b.world_size} ranks"
    return _other_groups(a, b)


def _shape(router: RouterInfo) -> tuple[str, int, int]:
    return router.site, router.num_experts, router.top_k


def _other_groups(a: Recording, b: Recording) -> str:
    """Compare groups: in one run, each member of a rank's group has the same group."""
    if a.parallel is None or b.parallel is None:
        return ""
    if a.rank == b.rank and a.parallel.mesh != b.parallel.mesh:
        return f"runs over different meshes, {_mesh(a)} and {_mesh(b)}"
    groups = {
        "tokens": (a.parallel.token_ranks, b.parallel.token_ranks),
        "experts": (a.parallel.expert_ranks, b.parallel.expert_ranks),
    }
    for what, (group, other_group) in groups.items():
        if (b.rank in group or a.rank in other_group) and set(group) != set(other_group):
            return (
                f"different runs: rank {a.rank} ({_mesh(a)}) shares {what} with ranks {list(group)}, "
                f"rank {b.rank} ({_mesh(b)}) with {list(other_group)}"
            )
    return ""


def _mesh(recording: Recording) -> str:
    mesh = recording.parallel.mesh if recording.parallel is not None else {}
    return " × ".join(f"{name} {size}" for name, size in mesh.items()) or "no mesh"


def copies(recordings: Sequence[Recording]) -> list[int]:
    """Return indices of recordings that repeat the calls of an earlier one, as copied or unpacked files do.

    A rank makes its calls one after another, so two of its recordings never start at the same nanosecond.
    """
    seen: set[tuple[int, tuple[tuple[str, int], ...]]] = set()
    found = []
    for i, recording in enumerate(recordings):
        calls = recording.calls
        key = (recording.rank, tuple(zip(calls.site.tolist(), calls.host_start_ns.tolist(), strict=True)))
        if key in seen and any(start_ns for _, start_ns in key[1]):
            found.append(i)
        seen.add(key)
    return found


def said_again(reads: Sequence[tuple[Path, Recording, bool]]) -> dict[Path, str]:
    """Return files that repeat others, with reasons: merged traces next to their parts, and copies.

    Args:
        reads: Each file with the recording of one rank, and whether the file is merged from several.
    """
    ranks = {recording.rank for _, recording, is_merged in reads if not is_merged}
    found = {path: _MERGED for path, recording, is_merged in reads if is_merged and recording.rank in ranks}
    others = [(path, recording) for path, recording, _ in reads if path not in found]
    return found | {others[i][0]: _AGAIN for i in copies([recording for _, recording in others])}


_MERGED = "it is merged from traces that are read here on their own"
_AGAIN = "it holds the same calls as another trace that is read here"
_WORKER = re.compile(r"(?P<worker>.+)\.\d{10,}\.pt\.trace\.json(\.gz)?")


def pooled(files: Sequence[tuple[str, int]]) -> list[str]:
    """Return a note if files, given by name and rank, are of several runs; names contain the process."""
    runs: dict[int, dict[str, int]] = {}
    for name, rank in files:
        match = _WORKER.fullmatch(name)
        if match is not None:
            workers = runs.setdefault(rank, {})
            workers[match["worker"]] = workers.get(match["worker"], 0) + 1
    longest = max(runs.values(), key=len, default={})
    if len(longest) < 2:
        return []
    listed = ", ".join(f"{worker} ({count})" for worker, count in list(longest.items())[:4])
    ellipsis = ", …" if len(longest) > 4 else ""
    return [
        f"these are traces of {len(longest)} runs, taken together: {listed}{ellipsis}; give "
        "one file, or a folder for each run, to tell them apart (and compare them with moe-trace diff)"
    ]
