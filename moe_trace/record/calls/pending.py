"""Calls waiting to be reduced: references to the routers' tensors, in columns, with nothing computed."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from moe_trace.find.contracts import RouterOutput
from moe_trace.find.routers import RouterSite
from moe_trace.record.calls.call import CallRecord, ForwardRecords, Records
from moe_trace.record.reduce.streams import stream_of_now

# Maximum number of logits in one batch. On a device this bounds the scratch memory to about 3 x 64 MiB; on a
# CPU a batch that fits its cache takes half the time of one that does not.
_REDUCED_ELEMENTS_MAX = {"cpu": 2**17, "cuda": 2**24}
_form = attrgetter("__class__", "shape", "dtype", "device")
_version = attrgetter("_version")

Columns = Sequence[Sequence[Tensor]]
"""The tensors of some calls: index, weights and, if present, logits."""
Usual = dict[tuple[bool, ...], tuple[int, ...]]
"""Usual versions of the tensors of a router's calls, keyed by which of them have none."""


@dataclass(slots=True)
class PendingCalls:
    """Calls, in columns, that can be reduced in one batch of kernels."""

    stream: int
    """Stream on which the tensors are computed; on another one they might be read too early."""
    shape: torch.Size
    """[T, K] of each call."""
    room: int
    """Number of further calls that fit the batch."""
    held: int
    """Bytes that each call keeps alive."""
    records: Records = field(default_factory=Records)
    index: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """Empty if the routers have no true logits."""
    masks: list[Tensor] = field(default_factory=list)
    """Padding mask or token phases of each call; empty if unknown."""
    versions: list[tuple[int, ...]] = field(default_factory=list)
    """Versions of each call's tensors when they were returned."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def columns(self) -> tuple[list[Tensor], ...]:
        """The tensors of the calls, one list per kind."""
        return (self.index, self.weights, self.logits) if self.logits else (self.index, self.weights)

    @property
    def is_uniform(self) -> bool:
        """Whether all calls have the form of the first one."""
        return all(len(set(map(_form, column))) == 1 for column in self.columns)

    def without(self, calls: Container[int]) -> Iterator[PendingCalls]:
        """Return the group without some calls, split into groups of one form each."""
        store = PendingStore()
        rows = zip_longest(self.records, self.index, self.weights, self.logits, self.masks)
        for number, (record, index, weights, logits, mask) in enumerate(rows):
            if number not in calls:
                store.add(record, RouterOutput(index, weights, logits), mask, self.stream)
        return iter(store.take())


class PendingStore:
    """All pending calls, in groups. Callers must serialise access."""

    def __init__(self) -> None:
        self.calls = 0
        self.held_bytes = 0
        """Memory that the calls keep alive."""
        self.device_type = "cpu"
        """Device type of the last new form of calls."""
        self._open: dict[Any, PendingCalls] = {}
        self._full: list[PendingCalls] = []

    def groups(self) -> list[PendingCalls]:
        return [*self._full, *self._open.values()]

    def take(self) -> list[PendingCalls]:
        """Remove and return all groups."""
        groups = self.groups()
        self.__dict__.update(PendingStore().__dict__)
        return groups

    def add(
        self,
        record: CallRecord,
        reading: RouterOutput,
        mask: Tensor | None,
        stream: int | None = None,
        usual: Usual | None = None,
    ) -> None:
        """Keep references to the tensors of a call.

        Args:
            mask: padding mask, if known.
            usual: versions that the router's tensors usually have, if they were not read when the tensors
                were returned.
            stream: stream on which they are computed; None for the current one.
        """
        tensors = [
            reading.index_TK,
            reading.weights_TK,
            *([] if reading.logits_TE is None else [reading.logits_TE]),
        ]
        columns = [[tensor] for tensor in tensors]
        slots = None if record.slots_2P is None else record.slots_2P.shape
        group = self._group(columns, record.site, mask, 1, stream, (record.sending, slots))
        now = versions_of(columns)
        versions = now if usual is None else [usual.setdefault(tuple(v < 0 for v in now[0]), now[0])]
        self._extend(group, [record], columns, versions, [mask])  # type: ignore[arg-type]

    def add_forwards(
        self,
        records: Sequence[ForwardRecords],
        columns: Columns,
        versions: Sequence[tuple[int, ...]],
        masks: Sequence[Tensor | None],
    ) -> bool:
        """Keep references to the tensors of the calls of forwards, assumed to have one form.

        Args:
            columns: their tensors; only the first of each column is inspected before the reduction.
            versions: versions of each call's tensors when they were returned, for one forward.
            masks: one mask per forward, or None for each.

        Returns:
            False, with nothing kept, if one batch cannot hold the calls or only some forwards have a mask.
        """
        if len(set(map(_kind, masks))) > 1:
            return False
        group = self._group(columns, records[0].sites[0], masks[0], len(columns[0]))
        if group is None:
            return False
        self._extend(group, records, columns, [*versions] * len(records), masks)
        return True

    def _extend(
        self,
        group: PendingCalls,
        records: Sequence[CallRecord | ForwardRecords],
        columns: Columns,
        versions: Sequence[tuple[int, ...]],
        masks: Sequence[Tensor | None],
    ) -> None:
        calls = len(columns[0])
        group.index.extend(columns[0])
        group.weights.extend(columns[1])
        if len(columns) == 3:
            group.logits.extend(columns[2])
        for record, mask in zip(records, masks, strict=True):
            group.records.append(record)
            if mask is not None:
                group.masks.extend([mask] * len(record))
        group.versions.extend(versions)
        group.room -= calls
        self.calls += calls
        self.held_bytes += calls * group.held

    def _group(
        self,
        columns: Columns,
        site: RouterSite,
        mask: Tensor | None,
        calls: int,
        stream: int | None = None,
        sent: tuple[Any, Any] = (None, None),
    ) -> PendingCalls | None:
        """Return the group for calls of the form of the first one; None if one batch cannot hold them."""
        tensors, experts = [column[0] for column in columns], site.info.num_experts
        stream = stream_of_now(tensors[0]) if stream is None else stream
        form = (stream, *map(_form, tensors), experts, _kind(mask), sent)
        group = self._open.get(form)
        if group is not None and group.room >= calls:
            return group
        self.device_type = tensors[0].device.type
        widest = max(1, tensors[-1].numel(), experts)  # results are `experts` wide
        capacity = max(1, _REDUCED_ELEMENTS_MAX.get(self.device_type, 2**24) // widest)
        if capacity < calls:
            return None
        if group is not None:
            self._full.append(group)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        group = self._open[form] = PendingCalls(stream, tensors[0].shape, capacity, nbytes)
        return group


def _kind(mask: Tensor | None) -> torch.dtype | None:
    return None if mask is None else mask.dtype


def versions_of(columns: Columns) -> list[tuple[int, ...]]:
    """Return the version counters of each call's tensors; -1 for inference tensors, which have none."""
    try:
        return list(zip(*[map(_version, column) for column in columns], strict=True))
    except RuntimeError:
        counted = [[-1 if t.is_inference() else t._version for t in column] for column in columns]
        return list(zip(*counted, strict=True))
