"""Descriptions of a forward's tokens, taken from its arguments without synchronizing with the device.

Tensors are copied, since the caller may overwrite them before they are read. They are copied to the host
with the expert ids, where `identity.py` makes columns of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_trace.record.forward.batch_tokens import BatchTokens
from moe_trace.record.forward.inputs import ModelInputs
from moe_trace.record.forward.isolation import apart
from moe_trace.record.reduce.streams import copies_on_host, on_stream, stream_of_now

_IDS = ("input_ids", "tokens", "idx")
_STARTS = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q", "cu_seq_lens")


@dataclass(slots=True, eq=False)
class ForwardTokens:
    """The tokens of one forward, [rows, length]."""

    rows: int = 0
    """Number of rows; 0 if unknown."""
    length: int = 0
    flat: bool = False
    """Whether the input has no batch dimension, so that sequences cannot be inferred from its shape."""
    cached: int | None = None
    """Number of earlier tokens of each row; None if given by a tensor or unknown."""
    continues: bool = False
    """Whether earlier tokens are known to exist."""
    run: int = 0
    """Number shared by the forwards of the same sequences: a prefill and the decoding after it."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Tensors [n] int32: `token_ids`, `positions`, `padding`, `before` (number of earlier real tokens, by
    row), `starts` (of packed sequences)."""
    batch: BatchTokens | None = None
    """Description by a host framework, which replaces all parts but the ids."""
    stream: int = 0
    """Handle of the stream on which the parts were made."""
    _pending: tuple[Any, Any, dict[str, slice]] | None = None
    _host: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of tokens of all rows."""
        return self.rows * self.length

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the shipped parts on the host. Waits for the copy."""
        if self._pending is not None:
            copy, copied, slices = self._pending
            if copied is not None:
                copied.synchronize()
            flat = copy.numpy()
            self._host |= {name: flat[part].copy() for name, part in slices.items()}
            self._pending = None
        return self._host


def ship_tokens(forwards: Iterable[ForwardTokens]) -> None:
    """Start the copies of all parts to the host, one per device and stream, without synchronizing."""
    by_stream: dict[Any, list[tuple[ForwardTokens, str, Tensor]]] = {}
    for tokens in forwards:
        for name, part in tokens.parts.items():
            by_stream.setdefault((part.device, tokens.stream), []).append((tokens, name, part))
        tokens.parts = {}
    for (_, stream), found in by_stream.items():
        with on_stream(found[0][-1], stream):
            (copy,), copied = copies_on_host([torch.cat([part for _, _, part in found])])
        start = 0
        slices: dict[ForwardTokens, dict[str, slice]] = {}
        for tokens, name, part in found:
            slices.setdefault(tokens, {})[name] = slice(start, start := start + len(part))
        for tokens, own_slices in slices.items():
            tokens.arrays()  # first collect parts from another device
            tokens._pending = (copy, copied, own_slices)


def look_at_tokens(
    inputs: ModelInputs, args: Any, kwargs: dict[str, Any], padding_T: Tensor | None, *, token_ids: bool
) -> ForwardTokens:
    """Return a description of the tokens in the arguments of a forward.

    Args:
        padding_T: mask of padding tokens, if known; it is never written to.
        token_ids: whether to keep the ids too.
    """
    try:
        with apart():
            return _describe(inputs, args, kwargs, padding_T, token_ids)
    except Exception:  # unexpected arguments must not break the forward
        return ForwardTokens()


def _describe(
    inputs: ModelInputs, args: Any, kwargs: dict[str, Any], padding_T: Tensor | None, token_ids: bool
) -> ForwardTokens:
    tensor = inputs.tokens(args, kwargs)
    if tensor is None:
        tensor = _unnamed(inputs, args, kwargs)
        if tensor is None:
            return ForwardTokens()
    flat = tensor.dim() == 1
    rows, length = (1, tensor.shape[0]) if flat else (tensor.shape[0], tensor.shape[1])
    tokens, parts = ForwardTokens(rows, length, flat), {}
    if token_ids:
        ids = inputs.given(args, kwargs, _IDS) if tensor.is_floating_point() else tensor
        if isinstance(ids, Tensor) and ids.numel() == tokens.count:
            parts["token_ids"] = _flat(ids)
    positions = inputs.given(args, kwargs, inputs.position_names)
    if isinstance(positions, Tensor) and positions.dim() <= 2 and positions.numel() in (tokens.count, length):
        parts["positions"] = _flat(positions.expand(rows, length) if not flat else positions)
    starts = inputs.given(args, kwargs, _STARTS)
    if isinstance(starts, Tensor) and starts.dim() == 1 and starts.numel() > 1:
        parts["starts"] = _flat(starts)
    if padding_T is not None and padding_T.numel() == tokens.count:
        parts["padding"] = _flat(padding_T)
    _set_earlier(tokens, parts, inputs, args, kwargs)
    tokens.parts, tokens.stream = parts, stream_of_now(tensor)
    return tokens


def _set_earlier(
    tokens: ForwardTokens, parts: dict[str, Tensor], inputs: ModelInputs, args: Any, kwargs: dict[str, Any]
) -> None:
    """Set the number of earlier tokens of each row: those in the cache, less the padding in the mask."""
    cached = inputs.cached(args, kwargs)
    mask = inputs.mask(args, kwargs)
    if mask is not None:
        if "padding" not in parts:
            return
        if mask.shape[1] > tokens.length:
            tokens.continues = True
            parts["before"] = _flat((mask[:, : -tokens.length] != 0).sum(1))
        elif cached == 0:
            tokens.cached = 0
    elif isinstance(cached, Tensor) and cached.numel() == 1:
        parts["before"] = _flat(cached.expand(tokens.rows))
    elif isinstance(cached, int):
        tokens.cached, tokens.continues = cached, cached > 0


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.int32, copy=True).flatten()


def _unnamed(inputs: ModelInputs, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return ids without a batch dimension, or the first argument if it can only be ids, or None."""
    named = inputs.given(args, kwargs, _IDS)
    first = named if isinstance(named, Tensor) else args[0] if args else None
    if not isinstance(first, Tensor) or first.is_floating_point() or first.is_complex():
        return None
    if first.dtype == torch.bool or first.dim() not in (1, 2) or (first is not named and first.dim() == 1):
        return None
    return first
