"""Static device buffers that compiled code and CUDA graphs write router outputs into.

Python does not run when a graph is replayed, so neither tensor references nor the host's clock are
available. Only tensor operations become part of the graph: each router copies its output into its own ring,
at a slot that is counted on the device.

A row of a ring is float32: [forward number, epoch, code, tokens, ...]. Small calls are copied raw, which
Inductor fuses into one kernel, and reduced together later; large ones are reduced inside the graph, so that
rows have a fixed width. Shape suffixes: S sites, T tokens, E experts, K slots per token, C logits per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_trace.data.schema import STAGES, Stage
from moe_trace.find.contracts import RouterOutput
from moe_trace.find.private.torch_names import mark_static_address
from moe_trace.record.forward.batch_tokens import BatchTokens
from moe_trace.record.reduce.stats import FLOAT_FIELDS, PackedStats, routing_stats, small_ids

HEADER = 4
EXACT = 2**24  # integers below this are exact in float32
PHASES_MAX = 2**17
"""Maximum number of tokens of a forward whose phases graphs can read."""

RingKind = Literal["small", "medium", "reduced"]
RING_KINDS: tuple[RingKind, ...] = ("small", "medium", "reduced")
_TOKENS: dict[RingKind, int] = {"small": 4, "medium": 64}  # calls of up to this many tokens are copied raw
_BYTES = 16 * 2**20  # maximum for each kind of ring, over all sites
_SLOTS: dict[RingKind, int] = {"small": 1024, "medium": 1024, "reduced": 256}  # maximum, in forwards


class ForwardCounter:
    """Counter of forwards on the device, whether started by an eager hook, compiled code or a graph replay.

    `forwards` is the count; `code` is epoch << 8 | stage << 1 | counted inside a graph. The host begins an
    epoch with each forward that it sees, and keeps that forward's times by epoch. Both are 0-dimensional:
    with symbolic shapes, a compiler would compare their sizes with those of the batch.

    Args:
        tells: whether a host framework reports the phases of tokens, which graphs then read from `phases`.
    """

    def __init__(self, device: torch.device, *, forwards: int, epoch: int, tells: bool = False) -> None:
        self.device = device
        self.phases: Tensor | None = None
        self._described = False
        if tells:
            self.phases = torch.zeros(PHASES_MAX, dtype=torch.uint8, device=device)
            mark_static_address(self.phases)
        self.forwards = torch.full((), forwards, dtype=torch.int64, device=device)
        self.code = torch.full((), epoch << 8, dtype=torch.int64, device=device)
        mark_static_address(self.forwards)
        mark_static_address(self.code)

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """All tensors that graphs use."""
        return (self.forwards, self.code) if self.phases is None else (self.forwards, self.code, self.phases)

    def describe(self, batch: BatchTokens | None) -> None:
        """Write the phases of the tokens of the forward that begins, without synchronizing."""
        if self.phases is None:
            return
        if batch is not None:
            phases = batch.as_tensor()[:PHASES_MAX]
            phases = phases.pin_memory() if self.device.type == "cuda" else phases
            self.phases[: len(phases)].copy_(phases, non_blocking=True)
        elif self._described:
            self.phases.zero_()
        self._described = batch is not None

    def phases_of(self, tokens: int) -> Tensor | None:
        """Return the forward's phases, [tokens] uint8 (0 above `PHASES_MAX`), by tensor operations only."""
        if self.phases is None:
            return None
        return self.phases[:tokens] if tokens <= PHASES_MAX else self.phases.new_zeros(tokens)

    def restart(self, *, forwards: int, epoch: int) -> None:
        """Continue from this count and epoch, without phases."""
        self.describe(None)
        self.forwards.fill_(forwards)
        self.code.fill_(epoch << 8)

    def start_on_host(self, epoch: int, stage: Stage) -> None:
        """Count a forward that the host sees: two kernel launches, no copy, no synchronization."""
        self.forwards.add_(1)
        self.code.fill_((epoch << 8) | (STAGES.index(stage) << 1))

    def start_in_graph(self) -> None:
        """Count a forward while tracing or capturing; its code is a constant of the graph."""
        self.forwards.add_(1)


@dataclass(frozen=True)
class RingShape:
    """The properties that rings must share to be reduced together."""

    num_experts: int
    top_k: int
    classes: int
    """C; 0 if the router has no true logits."""
    kind: RingKind
    slots: int
    device: torch.device
    tells: bool = False
    """Whether rows also hold the phases of tokens."""
    num_slots: int = 0
    """P; if not 0, the header is followed by the load of each physical slot and the expert that it held."""

    @property
    def start(self) -> int:
        """Offset of the router output in a row."""
        return HEADER + 2 * self.num_slots

    @property
    def width(self) -> int:
        """Number of floats in a row."""
        if self.kind == "reduced":
            return self.start + self.ints_width + len(FLOAT_FIELDS)
        return self.start + _TOKENS[self.kind] * self.token_width

    @property
    def token_width(self) -> int:
        return 2 * self.top_k + self.classes + self.tells

    @property
    def ints_width(self) -> int:
        return self.num_experts + 2 + self.top_k + 1 + 2 + 2 * self.num_experts * self.tells


def ring_kind(tokens: int) -> RingKind:
    """Return the kind of ring that a call of `tokens` tokens is written to."""
    return "small" if tokens <= _TOKENS["small"] else "medium" if tokens <= _TOKENS["medium"] else "reduced"


class GraphRing:
    """One ring buffer of one router: `data` is flat, [slots * width].

    Args:
        sites: number of routers that share the memory bound.
    """

    def __init__(
        self,
        kind: RingKind,
        *,
        num_experts: int,
        top_k: int,
        classes: int,
        sites: int,
        counter: ForwardCounter,
        num_slots: int = 0,
    ) -> None:
        shape = RingShape(
            num_experts, top_k, classes, kind, 1, counter.device, counter.phases is not None, num_slots
        )
        slots = max(1, min(_SLOTS[kind], _BYTES // (4 * shape.width * sites)))
        self.shape = replace(shape, slots=slots)
        self.width, self.slots = self.shape.width, slots
        self.num_experts = num_experts
        self.counter = counter
        self.data = torch.zeros(slots * self.width, device=counter.device)
        # A static address lets CUDA graphs write to it without copying it.
        mark_static_address(self.data)

    def body(self, reading: RouterOutput) -> Tensor:
        """Return the row after the header that `put` writes for a call, using tensor operations only."""
        body = self._reduced(reading) if self.shape.kind == "reduced" else self._raw(reading)
        if not self.shape.num_slots:
            return body
        slots = reading.slots_2P
        return _concatenate(
            [body.new_full((self.shape.start - HEADER,), -1) if slots is None else slots.float(), body]
        )

    def _raw(self, reading: RouterOutput) -> Tensor:
        """Return the raw call, [T * `token_width`]."""
        parts = [reading.index_TK, reading.weights_TK]
        if reading.logits_TE is not None:
            parts.append(reading.logits_TE)
        phases_T = self.counter.phases_of(reading.index_TK.shape[0])
        if phases_T is not None:
            parts.append(phases_T.unsqueeze(-1))
        return _concatenate([part.detach().float() for part in parts]).flatten()

    def _reduced(self, reading: RouterOutput) -> Tensor:
        logits, phases_T = reading.logits_TE, self.counter.phases_of(reading.index_TK.shape[0])
        stats = routing_stats(
            None if logits is None else logits.detach().unsqueeze(0),
            reading.weights_TK.detach().unsqueeze(0),
            reading.index_TK.unsqueeze(0),
            self.num_experts,
            None if phases_T is None else phases_T.unsqueeze(0),
        )
        return torch.cat([stats.ints[0].float(), stats.floats[0]])

    def put(self, body: Tensor, tokens: int, code: int | None) -> None:
        """Write the row of a call into the slot of the forward in progress.

        Args:
            code: code of the forward, if it is known while tracing; None to read it from the counter.
        """
        forwards, epoch_and_code = self.counter.forwards, self.counter.code
        header = [
            forwards % EXACT,
            (epoch_and_code >> 8) % EXACT,
            epoch_and_code & 255 if code is None else torch.full_like(forwards, code),
            torch.full_like(forwards, tokens),
        ]
        row = _concatenate([*(number.float().view(1) for number in header), body])
        # Scatter into the flat buffer: for a view of it, functionalization would copy the whole ring.
        slot = self.counter.forwards % self.slots
        positions = slot * self.width + torch.arange(row.shape[0], device=row.device)
        self.data.index_put_((positions,), row)


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat(parts, dim=-1)`.

    While compiling, use a form that every compiler fuses into the kernel that reads it; whether `cat` is
    fused depends on the compiler's version, the device, and the other users of the parts.
    """
    if not torch.compiler.is_compiling():
        return torch.cat(list(parts), dim=-1)
    width, start, joined = sum(part.shape[-1] for part in parts), 0, None
    for part in parts:
        padded = torch.nn.functional.pad(part, (start, width - start - part.shape[-1]))
        joined = padded if joined is None else joined + padded
        start += part.shape[-1]
    assert joined is not None
    return joined


def reduce_rings(rings: Sequence[GraphRing]) -> tuple[Tensor, PackedStats]:
    """Reduce rings of one shape to (headers [S * slots, 4], stats), site by site, without synchronizing.

    For raw calls, token rows that a call did not fill are counted as tokens whose slots are all out of
    range; `unpad` subtracts them.
    """
    shape = rings[0].shape
    rows = torch.stack([ring.data for ring in rings]).view(-1, shape.width)
    parts = [HEADER, shape.start - HEADER, shape.width - shape.start]
    headers, slots, body = rows.split(parts, dim=-1)
    if shape.kind == "reduced":
        ints, floats = body.split([shape.ints_width, len(FLOAT_FIELDS)], dim=-1)
        return headers, PackedStats(torch.cat([ints, slots], dim=-1).round().long(), floats)
    tokens_LTW = body.view(len(rows), _TOKENS[shape.kind], shape.token_width)
    parts = [shape.top_k, shape.top_k, shape.classes, int(shape.tells)]
    index, weights, logits, phases = tokens_LTW.split(parts, dim=-1)
    unused = torch.arange(tokens_LTW.shape[1], device=rows.device) >= headers[:, 3:4]
    unused_LT1 = unused.unsqueeze(-1)
    stats = routing_stats(
        logits.masked_fill(unused_LT1, torch.nan) if shape.classes else None,
        weights.masked_fill(unused_LT1, 1.0),
        index.round().long().masked_fill(unused_LT1, -1),
        shape.num_experts,
        phases.squeeze(-1).round().to(torch.uint8) if shape.tells else None,
    )
    return headers, PackedStats(torch.cat([stats.ints, slots.round().long()], dim=-1), stats.floats)


def raw_routes(rings: Sequence[GraphRing]) -> tuple[Tensor, Tensor]:
    """Return (ids as from `small_ids`, float16 weights), [S * slots, tokens, K] each, from raw rings."""
    shape = rings[0].shape
    rows = torch.stack([ring.data for ring in rings]).view(-1, shape.width)
    tokens_LTW = rows[:, shape.start :].view(len(rows), _TOKENS[shape.kind], shape.token_width)
    index, weights = tokens_LTW[..., : 2 * shape.top_k].split(shape.top_k, dim=-1)
    return small_ids(index.round().long(), weights, shape.num_experts), weights.half()


def unpad(shape: RingShape, ints: Tensor, tokens: int) -> None:
    """Subtract the token rows that a call of `tokens` tokens did not fill from its integers, in place."""
    if shape.kind == "reduced":
        return
    unused = _TOKENS[shape.kind] - tokens
    ints[..., shape.num_experts + 1] -= unused * shape.top_k  # out of range
    ints[..., shape.num_experts + 2] -= unused  # tokens without a used slot
