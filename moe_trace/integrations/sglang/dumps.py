"""Dumps of SGLang's expert distribution recorder: `expert_distribution_recorder_<time>[_<rank>].pt`.

Follows `sglang.srt.eplb.expert_distribution`, but has not been run with it. Contents by
`--expert-distribution-recorder-mode`:

    stat, stat_approx   logical_count [steps, layers, experts], summed over ranks; a ring of buffered steps
    per_pass            records of one rank: global_physical_count [layers, slots] per forward
    per_token           the same, and topk_ids_of_layer [layers, tokens, 8] with input_ids and positions

Slots are mapped to experts by `last_physical_to_logical_map` [layers, slots].
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_trace.data.errors import UsageError
from moe_trace.read.routes.interchange.arrays import Capture

_OTHER_FORMATS = (
    "other counts are taken as a .npy of whole numbers [steps, layers, experts], or as JSON, such as "
    "`moe-trace export --to eplb` writes"
)


def counts_of_dump(path: str | Path) -> np.ndarray:
    """Return counts as int64, [steps, layers, experts], without steps in which nothing was counted.

    Raises:
        UsageError: the file is not such a dump.
    """
    dump = _load(Path(path))
    if "logical_count" in dump:
        counts = _integer_array(dump["logical_count"], 3, path)
    else:
        slots = _slot_map(dump, path)
        rows = [
            _integer_array(record.get("global_physical_count"), 2, path) for record in _records(dump, path)
        ]
        counts = np.stack([_by_expert(row, slots, path) for row in rows])
    counted = counts.any((1, 2))
    if not counted.any():
        raise UsageError(f"{path}: found no counts but 0; dump after /stop_expert_distribution_record")
    return counts[counted]


def routes_of_dump(path: str | Path) -> Capture:
    """Return each token's expert ids in a `per_token` dump, with token id, position and forward.

    Layers and slots without any id are left out.

    Raises:
        UsageError: the file is not such a dump.
    """
    dump = _load(Path(path))
    records = _records(dump, path) if "records" in dump else [{}]
    if "topk_ids_of_layer" not in records[0]:
        raise UsageError(
            f"{path}: found a dump without ids of tokens, expected one of "
            "--expert-distribution-recorder-mode per_token"
        )
    slots, ids = (
        _slot_map(dump, path),
        [_integer_array(record.get("topk_ids_of_layer"), 3, path) for record in records],
    )
    shapes = {(len(part), part.shape[2]) for part in ids}
    if {layers for layers, _ in shapes} != {len(slots)} or len(shapes) > 1:
        raise UsageError(f"{path}: found ids of {sorted(shapes)} layers and slots beside {len(slots)} layers")
    ids_LTK, lengths = np.concatenate(ids, axis=1), [part.shape[1] for part in ids]
    if ids_LTK.max(initial=-1) >= slots.shape[1]:
        raise UsageError(f"{path}: found the id {ids_LTK.max()}, expected one of {slots.shape[1]} slots")
    experts = np.take_along_axis(slots[:, None, :], np.maximum(ids_LTK, 0), axis=2)
    ids_TLK = np.where(ids_LTK < 0, -1, experts).transpose(1, 0, 2)
    layers, columns = (ids_TLK >= 0).any((0, 2)), (ids_TLK >= 0).any((0, 1))
    return Capture(
        ids_TLK[:, layers][:, :, columns],
        "SGLang",
        layers=[f"layers.{layer}" for layer in np.flatnonzero(layers)],
        position=_column(records, "positions", lengths, path),
        forward=np.repeat([int(record.get("forward_pass_id", 0)) for record in records], lengths),
        token_ids=_column(records, "input_ids", lengths, path).astype(np.int32),
        rank=int(records[0].get("rank", 0)),
        notes=["slots are taken to experts by the last map of the dump, which may have changed since"],
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{path}: cannot be read as a dump of SGLang's recorder ({first:.150}); {_OTHER_FORMATS}"
        ) from error
    if not isinstance(dump, dict) or not {"logical_count", "records"} & dump.keys():
        found = (
            f"the keys {', '.join(map(str, dump))[:80]}" if isinstance(dump, dict) else type(dump).__name__
        )
        raise UsageError(f"{path}: found {found}, expected logical_count or records; {_OTHER_FORMATS}")
    return dump


def _records(dump: dict[str, Any], path: str | Path) -> list[dict[str, Any]]:
    records = dump["records"]
    if not isinstance(records, list) or not records or not all(isinstance(item, dict) for item in records):
        raise UsageError(f"{path}: found no forwards in records, expected one or more")
    return records


def _integer_array(value: Any, dims: int, path: str | Path) -> np.ndarray:
    if not isinstance(value, torch.Tensor) or value.dim() != dims or value.is_floating_point():
        form = (
            f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        )
        raise UsageError(f"{path}: found {form}, expected whole numbers of {dims} dimensions")
    return value.numpy().astype(np.int64)


def _slot_map(dump: dict[str, Any], path: str | Path) -> np.ndarray:
    return _integer_array(dump.get("last_physical_to_logical_map"), 2, path)


def _by_expert(counts_LP: np.ndarray, slots_LP: np.ndarray, path: str | Path) -> np.ndarray:
    """Return counts by expert, [L, E], summed over the replicas of each."""
    if counts_LP.shape != slots_LP.shape or slots_LP.min(initial=0) < 0:
        raise UsageError(
            f"{path}: found counts {list(counts_LP.shape)} beside a map {list(slots_LP.shape)} of slots"
        )
    counts_LE = np.zeros((len(counts_LP), slots_LP.max(initial=-1) + 1), np.int64)
    np.add.at(counts_LE, (np.arange(len(counts_LP))[:, None], slots_LP), counts_LP)
    return counts_LE


def _column(records: list[dict[str, Any]], name: str, lengths: list[int], path: str | Path) -> np.ndarray:
    values = [np.asarray(record.get(name, []), dtype=np.int64).ravel() for record in records]
    if [len(value) for value in values] != lengths:
        raise UsageError(f"{path}: found {name} for other tokens than the ids, expected one for each")
    return np.concatenate(values)
