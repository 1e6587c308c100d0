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
"""A sequence, position or token id that is unknown."""


def id_type(num_experts: int) -> np.dtype[Any]:
    """The type of expert ids: its greatest value stands for "no expert", and is no id."""
    return np.dtype(np.uint8 if num_experts <= 255 else np.uint16)


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedRoutes:
    """The routes of T tokens through L layers of K slots, rows in the order of the calls.

    Layers that see other tokens than their neighbours (an encoder, a vision tower) stand in a group of their
    own: `groups` has all of them, and the columns here are those of the first, which has the most
    assignments.

    Raises:
        ValueError: columns of different lengths, or of the wrong type.
    """

    expert_ids: np.ndarray
    """[T, L, K] uint8, or uint16 from 256 experts on: as the experts received them, in the router's order;
    `no_expert` where a slot was skipped, and all K where the layer's call was lost."""
    layers: tuple[str, ...]
    """Module paths of the L routers."""
    num_experts: tuple[int, ...]
    """Experts of each of the L layers."""
    top_k: tuple[int, ...]
    """Slots of each; slots beyond are `no_expert`."""
    padding: np.ndarray
    """[T] bool: tokens that the attention mask leaves out."""
    step: np.ndarray
    """[T] int64, as `RoutingSample.step`."""
    forward: np.ndarray
    """[T] int64: number of the forward of the model; the tokens of a batch ran together."""
    sequence: np.ndarray
    """[T] int32: row of the batch, number of the packed sequence, or of the request where a host framework
    told; `UNKNOWN` where nobody did."""
    position: np.ndarray
    """[T] int32: position within the sequence, padding not counted; `UNKNOWN` where no one reports it."""
    stage_codes: np.ndarray
    """[T] uint8: places in `STAGES`."""
    recomputed: np.ndarray | None = None
    """[T] bool: run again by the backward of a checkpointed region; None where none was."""
    lost_layers: np.ndarray | None = None
    """[T, L] bool: layers whose call was lost; None where none was."""
    weights: np.ndarray | None = None
    """[T, L, K] float16: gating weights, where they were asked for."""
    token_ids: np.ndarray | None = None
    """[T] int32: ids of the prompt's tokens, where they were asked for."""
    rank: int = 0
    world_size: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    """Name and class of the model, as in `Recording.model`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Tokens that are not here, by reason."""
    incomplete: str = ""
    """What a file lacks that was not closed, in words."""
    others: tuple[RecordedRoutes, ...] = ()
    """Groups of layers that saw other tokens; see `groups`."""

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
        """What stands in `expert_ids` for a slot without an expert."""
        return int(np.iinfo(self.expert_ids.dtype).max)

    @property
    def skipped(self) -> np.ndarray:
        """[T, L, K] bool: slots that went to no expert: of weight zero, beyond a capacity, or lost."""
        return self.expert_ids == self.no_expert

    @property
    def again(self) -> np.ndarray:
        """[T] bool: `recomputed`, also where none was."""
        return np.zeros(len(self), bool) if self.recomputed is None else self.recomputed

    @property
    def counted(self) -> np.ndarray:
        """[T] bool: tokens that figures are of, which are no padding and were not run again."""
        return ~(self.padding | self.again)

    @property
    def stage(self) -> np.ndarray:
        """[T] str: `prefill`, `decode` or `train`; `mixed` where a forward's tokens are not distinguished."""
        return np.array(STAGES)[self.stage_codes]

    @property
    def described(self) -> Group:
        """What a file says of this group of layers."""
        kind: Any = self.expert_ids.dtype.newbyteorder("<").str
        experts, top_k = map(int, self.num_experts), map(int, self.top_k)
        return Group(tuple(self.layers), tuple(experts), tuple(top_k), self.expert_ids.shape[2], kind)

    @property
    def run(self) -> dict[str, Any]:
        """What a file says of the run."""
        model, versions = dict(self.model), dict(self.versions)
        return {"rank": self.rank, "world_size": self.world_size, "model": model, "versions": versions}

    @property
    def nbytes(self) -> int:
        """Bytes of the columns of all groups."""
        own = sum(column.nbytes for column in self.columns().values())
        return own + sum(group.nbytes for group in self.others)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns that are there, by name."""
        named = ((name, getattr(self, name)) for name in COLUMNS)
        return {name: column for name, column in named if column is not None}

    def __getitem__(self, tokens: Any) -> RecordedRoutes:
        """The same of some tokens: a slice, indices or a mask of T; of this group alone."""
        chosen: Any = {name: column[tokens] for name, column in self.columns().items()}
        return replace(self, others=(), **chosen)

    def save(self, path: str | Path, *, level: int = 1) -> Path:
        """Write all groups to a file, whole or not at all; `moe_trace.read_routes` reads it.

        Args:
            path: by convention ends in `.routes.npz`.
            level: of zlib, 0 to 9.

        Raises:
            OutputError: the file cannot be written.
        """
        return save_routes(self, path, level=level)

    def assignments(self) -> np.ndarray:
        """[L, E] int64: slots by layer and expert, padding included; E is the most of any layer."""
        experts = max(self.num_experts, default=0)
        counts_LE = np.zeros((len(self.layers), experts), np.int64)
        for layer, ids_TK in enumerate(np.moveaxis(self.expert_ids, 1, 0)):
            counts_LE[layer] = np.bincount(ids_TK.ravel(), minlength=self.no_expert + 1)[:experts]
        return counts_LE


COLUMNS = ("expert_ids", *TYPES)
ABSENT = {"recomputed": False, "lost_layers": False, "token_ids": UNKNOWN, "weights": np.nan}
"""What an optional column holds for tokens of a part without it."""


def concatenate(parts: Sequence[RecordedRoutes]) -> RecordedRoutes:
    """Parts of one run, in order; their layers are the same. Tokens that were dropped are added up.

    Raises:
        ValueError: no parts, or parts of other layers.
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
