"""`RecordedRoutes`: the experts of each token in each layer, as numpy columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.data.calls.sample import STAGES
from moe_trace.data.routes.header import TYPES, Group, column_shape
from moe_trace.data.routes.writer import added_up, save_routes

UNKNOWN = -1
"""Value of an unknown sequence, position or token id."""


def id_type(num_experts: int) -> np.dtype[Any]:
    """Return the dtype of expert ids. Its largest value means "no expert" and is not an id."""
    return np.dtype(np.uint8 if num_experts <= 255 else np.uint16)


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedRoutes:
    """Routes of T tokens through L layers of K slots, with rows in the order of the calls.

    Layers that see other tokens than their neighbours (an encoder, a vision tower) form a separate group:
    `groups` has all groups, and the columns here are those of the first, which has the most assignments.

    Raises:
        ValueError: columns of different lengths, or of the wrong type.
    """

    expert_ids: np.ndarray
    """[T, L, K] uint8, or uint16 from 256 experts on: ids as received by the experts, in the router's order;
    `no_expert` for skipped slots, and for all K if the layer's call was lost."""
    layers: tuple[str, ...]
    """Module paths of the L routers."""
    num_experts: tuple[int, ...]
    """Number of experts of each of the L layers."""
    top_k: tuple[int, ...]
    """Slots of each layer; slots beyond are `no_expert`."""
    padding: np.ndarray
    """[T] bool: tokens excluded by the attention mask."""
    step: np.ndarray
    """[T] int64, as `RoutingSample.step`."""
    forward: np.ndarray
    """[T] int64: number of the model's forward; the tokens of a batch share it."""
    sequence: np.ndarray
    """[T] int32: row of the batch, number of the packed sequence, or number of the request if a host
    framework reports it; `UNKNOWN` otherwise."""
    position: np.ndarray
    """[T] int32: position within the sequence, padding not counted; `UNKNOWN` if not reported."""
    stage_codes: np.ndarray
    """[T] uint8: indices into `STAGES`."""
    recomputed: np.ndarray | None = None
    """[T] bool: run again by the backward of a checkpointed region; None if there was none."""
    lost_layers: np.ndarray | None = None
    """[T, L] bool: layers whose call was lost; None if none was."""
    weights: np.ndarray | None = None
    """[T, L, K] float16: gating weights, if requested."""
    token_ids: np.ndarray | None = None
    """[T] int32: ids of the prompt's tokens, if requested."""
    rank: int = 0
    world_size: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    """Name and class of the model, as in `Recording.model`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Number of tokens left out, by reason."""
    incomplete: str = ""
    """Description of what is missing from a file that was not closed."""
    others: tuple[RecordedRoutes, ...] = ()
    """Other groups of layers; see `groups`."""

    def __post_init__(self) -> None:
        shape = np.shape(self.expert_ids)
        if len(shape) != 3 or self.expert_ids.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"expected expert_ids [T, L, K] of uint8 or uint16; found {self.expert_ids.dtype} {shape}"
            )
        if not len(self.layers) == len(self.num_experts) == len(self.top_k) == shape[1]:
            raise ValueError(f"expected a path, num_experts and top_k for each of {shape[1]} layers")
        for name, column in self.columns().items():
            if np.shape(column) != column_shape(name, *shape):
                expected = column_shape(name, *shape)
                raise ValueError(f"expected {name} of shape {expected}; found {np.shape(column)}")

    def __len__(self) -> int:
        return len(self.expert_ids)

    @property
    def groups(self) -> tuple[RecordedRoutes, ...]:
        """All groups of layers, this one first."""
        return (replace(self, others=()), *self.others)

    @property
    def no_expert(self) -> int:
        """Value in `expert_ids` of a slot without an expert."""
        return int(np.iinfo(self.expert_ids.dtype).max)

    @property
    def skipped(self) -> np.ndarray:
        """[T, L, K] bool: slots without an expert: weight zero, over capacity, or lost."""
        return self.expert_ids == self.no_expert

    @property
    def again(self) -> np.ndarray:
        """[T] bool: `recomputed`, all False if it is None."""
        return np.zeros(len(self), bool) if self.recomputed is None else self.recomputed

    @property
    def counted(self) -> np.ndarray:
        """[T] bool: tokens included in statistics, that is, neither padding nor recomputed."""
        return ~(self.padding | self.again)

    @property
    def stage(self) -> np.ndarray:
        """[T] str: `prefill`, `decode` or `train`; `mixed` where a forward's tokens are not distinguished."""
        return np.array(STAGES)[self.stage_codes]

    @property
    def described(self) -> Group:
        """Description of this group of layers, as stored in a file."""
        kind: Any = self.expert_ids.dtype.newbyteorder("<").str
        experts, top_k = map(int, self.num_experts), map(int, self.top_k)
        return Group(tuple(self.layers), tuple(experts), tuple(top_k), self.expert_ids.shape[2], kind)

    @property
    def run(self) -> dict[str, Any]:
        """Description of the run, as stored in a file."""
        model, versions = dict(self.model), dict(self.versions)
        return {"rank": self.rank, "world_size": self.world_size, "model": model, "versions": versions}

    @property
    def nbytes(self) -> int:
        """Size in bytes of the columns of all groups."""
        total = sum(column.nbytes for column in self.columns().values())
        return total + sum(group.nbytes for group in self.others)

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns that are present, by name."""
        named = ((name, getattr(self, name)) for name in COLUMNS)
        return {name: column for name, column in named if column is not None}

    def __getitem__(self, tokens: Any) -> RecordedRoutes:
        """Return some tokens of this group: a slice, indices or a mask, [T]."""
        chosen: Any = {name: column[tokens] for name, column in self.columns().items()}
        return replace(self, others=(), **chosen)

    def save(self, path: str | Path, *, level: int = 1) -> Path:
        """Write all groups to a file, atomically; `moe_trace.read_routes` reads it.

        Args:
            path: ends in `.routes.npz` by convention.
            level: zlib compression level, 0 to 9.

        Raises:
            OutputError: the file cannot be written.
        """
        return save_routes(self, path, level=level)

    def assignments(self) -> np.ndarray:
        """Return slots by layer and expert, [L, E] int64, padding included; E is the largest of any layer."""
        experts = max(self.num_experts, default=0)
        counts_LE = np.zeros((len(self.layers), experts), np.int64)
        for layer, ids_TK in enumerate(np.moveaxis(self.expert_ids, 1, 0)):
            counts_LE[layer] = np.bincount(ids_TK.ravel(), minlength=self.no_expert + 1)[:experts]
        return counts_LE


COLUMNS = ("expert_ids", *TYPES)
ABSENT = {"recomputed": False, "lost_layers": False, "token_ids": UNKNOWN, "weights": np.nan}
"""Value of an optional column for tokens of a part that lacks it."""


def concatenate(parts: Sequence[RecordedRoutes]) -> RecordedRoutes:
    """Join parts of one run with the same layers, in order. Counts of dropped tokens are summed.

    Raises:
        ValueError: no parts, or parts of different layers.
    """
    if not parts:
        raise ValueError("expected at least one part of the routes; found none")
    first = parts[0]
    if any(part.layers != first.layers for part in parts):
        raise ValueError("expected parts of the same layers; found others")
    present = [name for name in COLUMNS if any(getattr(part, name) is not None for part in parts)]
    joined: Any = {name: np.concatenate([_column(part, name) for part in parts]) for name in present}
    dropped = added_up(part.dropped for part in parts)
    return replace(first, dropped=dropped, others=(), **joined)


def _column(part: RecordedRoutes, name: str) -> np.ndarray:
    column: np.ndarray | None = getattr(part, name)
    if column is not None:
        return column
    return np.full(column_shape(name, *part.expert_ids.shape), ABSENT[name], TYPES[name])
