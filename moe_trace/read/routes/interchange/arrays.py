"""Convert arrays of expert ids, as used by engines and trainers, to `RecordedRoutes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_trace.data.errors import TraceFileError
from moe_trace.data.routes.columns import UNKNOWN, RecordedRoutes, id_type

_MOST_EXPERTS = 65_535


@dataclass
class Capture:
    """Ids of N tokens as captured by another tool, with what is known of the tokens."""

    ids: np.ndarray
    """[N, L, K] of any integer type; negative values mean no expert, and so does 255 in 8 bits."""
    captured_by: str
    layers: Sequence[str] = ()
    """Module paths; `layers.0` and so on if unknown."""
    sequence: np.ndarray | None = None
    position: np.ndarray | None = None
    step: np.ndarray | None = None
    forward: np.ndarray | None = None
    stage_codes: np.ndarray | None = None
    padding: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    rank: int = 0
    notes: list[str] = field(default_factory=list)
    """Descriptions of the changes made to the capture."""

    def routes(self, source: str, num_experts: int | None = None) -> RecordedRoutes:
        """Convert to routes; rows without any expert are marked as padding.

        Args:
            num_experts: Number of experts of each layer; by default the largest id + 1, which may be too few.

        Raises:
            TraceFileError: The array is not [N, L, K] of expert ids.
        """
        ids, tokens = self.ids, len(self.ids)
        if ids.ndim != 3 or ids.dtype.kind not in "iu":
            raise TraceFileError(
                f"{source}: found an array of {ids.dtype} {ids.shape}, expected integers of "
                "[tokens, layers, top_k], or [batch, tokens, layers, top_k] with an attention mask"
            )
        layers, slots = ids.shape[1:]
        empty = _is_fill(ids, num_experts)
        experts, kind = _experts(ids[~empty], num_experts, source)
        filled = np.where(empty, np.iinfo(kind).max, ids).astype(kind)
        self._note(empty, experts, given=num_experts is not None)
        unrouted: np.ndarray = empty.all((1, 2)) & (ids.size > 0)  # type: ignore[assignment]
        return RecordedRoutes(
            expert_ids=filled,
            layers=tuple(self.layers) or tuple(f"layers.{layer}" for layer in range(layers)),
            num_experts=(experts,) * layers,
            top_k=(slots,) * layers,
            padding=unrouted if self.padding is None else self.padding | unrouted,
            step=_column(self.step, tokens, 0, np.int64),
            forward=_column(self.forward, tokens, 0, np.int64),
            sequence=_column(self.sequence, tokens, UNKNOWN, np.int32),
            position=_column(self.position, tokens, UNKNOWN, np.int32),
            stage_codes=_column(self.stage_codes, tokens, 0, np.uint8),
            token_ids=self.token_ids,
            rank=self.rank,
            model={"captured_by": self.captured_by},
        )

    def _note(self, empty: np.ndarray, experts: int, *, given: bool) -> None:
        if empty.any():
            rows = int(empty.all((1, 2)).sum())
            self.notes.append(
                f"{int(empty.sum()):,} slots hold a fill (-1, or 255 of 8 bits) and are read as no expert; "
                f"{rows:,} tokens have nothing else and are marked as padding"
            )
        if not given:
            self.notes.append(f"the greatest id says {experts} experts; --num-experts says it for sure")


def _is_fill(ids: np.ndarray, num_experts: int | None) -> np.ndarray:
    """Return which entries are fill values, bool [N, L, K]."""
    if ids.dtype == np.uint8 and (num_experts or 0) < 256:
        return ids == 255
    return ids < 0 if ids.dtype.kind == "i" else np.zeros(ids.shape, np.bool_)


def _experts(ids: np.ndarray, num_experts: int | None, source: str) -> tuple[int, np.dtype[Any]]:
    """Return the number of experts of a layer, and a type for their ids and those that mean no expert."""
    greatest = int(ids.max(initial=0))
    experts = num_experts or greatest + 1
    if max(greatest, experts) >= _MOST_EXPERTS:
        raise TraceFileError(
            f"{source}: found the id {greatest:,}, expected at most {_MOST_EXPERTS - 1:,} experts; is this "
            "an array of expert ids?"
        )
    return experts, id_type(max(experts, greatest + 1))


def _column(column: np.ndarray | None, tokens: int, fill: int, kind: Any) -> np.ndarray:
    return np.full(tokens, fill, kind) if column is None else column.astype(kind)


def capture_of_arrays(arrays: dict[str, np.ndarray], source: str) -> Capture:
    """Convert named arrays, as in trainers' batches: `routed_experts`, and optionally `attention_mask`,
    `input_ids` and `position_ids` of [batch, tokens], and `prompt_routed_experts`.

    Raises:
        TraceFileError: There are no expert ids, or shapes do not match.
    """
    ids = arrays.get("routed_experts", next(iter(arrays.values())) if len(arrays) == 1 else None)
    if ids is None:
        raise TraceFileError(
            f"{source}: found {', '.join(sorted(arrays)[:8]) or 'no arrays'}; expected routed_experts"
        )
    prompt = arrays.get("prompt_routed_experts")
    if prompt is not None and prompt.ndim == ids.ndim == 3 and prompt.shape[1:] == ids.shape[1:]:
        stage_codes = np.repeat(np.array([0, 1], np.uint8), (len(prompt), len(ids)))
        ids = np.concatenate([prompt, ids])
        position = np.arange(len(ids))
        return Capture(ids, "vLLM", stage_codes=stage_codes, position=position, sequence=position * 0)
    if ids.ndim == 3:
        return Capture(ids, "an array", token_ids=_flat(arrays, "input_ids", ids.shape[:1], source))
    if ids.ndim != 4:
        return Capture(ids, "an array")
    return _capture_of_batch(ids, arrays, source)


def _capture_of_batch(ids: np.ndarray, arrays: dict[str, np.ndarray], source: str) -> Capture:
    """Convert ids of shape [B, S, L, K]."""
    batch = ids.shape[:2]
    mask, positions = (
        _flat(arrays, "attention_mask", batch, source),
        _flat(arrays, "position_ids", batch, source),
    )
    padding = None if mask is None else mask == 0
    if positions is None:
        kept = np.ones(batch, np.int64) if mask is None else (mask != 0).reshape(batch).astype(np.int64)
        positions = (np.cumsum(kept, axis=1) - 1).ravel()
    if padding is not None:
        positions = np.where(padding, UNKNOWN, positions)
    return Capture(
        ids.reshape(-1, *ids.shape[2:]),
        "verl",
        padding=padding,
        sequence=np.repeat(np.arange(batch[0]), batch[1]),
        position=positions,
        token_ids=_flat(arrays, "input_ids", batch, source),
    )


def _flat(arrays: dict[str, np.ndarray], name: str, shape: tuple[int, ...], source: str) -> np.ndarray | None:
    column = arrays.get(name)
    if column is None:
        return None
    if column.shape != shape or column.dtype.kind not in "iub":
        raise TraceFileError(
            f"{source}: found {name} of {column.dtype} {column.shape}, expected integers of {shape}, as many "
            "as tokens in routed_experts"
        )
    return column.ravel().astype(np.int32)
