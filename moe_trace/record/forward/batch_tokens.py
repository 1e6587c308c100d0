"""Description of a forward's tokens by a host framework: request, position and phase of each.

Servers batch tokens of many requests, prefilling and decoding, in one dimension, and pad them to the size of
a CUDA graph. The arguments of the model's forward do not show which token is which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_trace.data.routes.columns import UNKNOWN
from moe_trace.data.schema import Stage
from moe_trace.record.forward.isolation import warn_user

PREFILL, PADDING, DECODE = 0, 1, 2
"""Phases of a token. Boolean padding masks use the same encoding: True is 1, `PADDING`."""

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class BatchTokens:
    """The T tokens of one forward, in the order in which its routers receive them.

    Raises:
        ValueError: arrays of different lengths, or an unknown phase.
    """

    phases: npt.NDArray[np.uint8]
    """[T] `PREFILL`, `DECODE` or `PADDING`."""
    requests: Ints
    """[T] number of each token's request, constant over the request's life; `UNKNOWN` for padding."""
    positions: Ints
    """[T] position of each token within its request, from 0; `UNKNOWN` for padding."""
    prefill_tokens: int = field(init=False)
    decode_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        shapes = {np.shape(column) for column in (self.phases, self.requests, self.positions)}
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"expected a phase, request and position for each token; found shapes {shapes}")
        if self.phases.dtype != np.uint8 or int(self.phases.max(initial=0)) > DECODE:
            raise ValueError(f"expected phases 0 to {DECODE} of uint8; found others, of {self.phases.dtype}")
        object.__setattr__(self, "prefill_tokens", int(np.count_nonzero(self.phases == PREFILL)))
        object.__setattr__(self, "decode_tokens", int(np.count_nonzero(self.phases == DECODE)))

    @staticmethod
    def of_requests(
        requests: Sequence[int],
        *,
        tokens: Sequence[int],
        starts: Sequence[int],
        decode_from: Sequence[int],
        size: int | None = None,
    ) -> BatchTokens:
        """Build from tokens that are grouped by request, followed by padding.

        Args:
            requests: [R] number of each request.
            tokens: [R] number of its tokens in this forward.
            starts: [R] position of the first of them within the request.
            decode_from: [R] position from which its tokens are decoded: for a request that was never
                interrupted, the length of its prompt.
            size: T, including padding; None for no padding.

        Raises:
            ValueError: more tokens than `size`, or a negative number of tokens.
        """
        counts = np.asarray(tokens, np.int64)
        real = int(counts.sum())
        size = real if size is None else size
        if real > size or (counts < 0).any():
            raise ValueError(f"expected up to {size} tokens in all, and no request with fewer than none")
        row = np.repeat(np.arange(len(counts)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        positions = np.full(size, UNKNOWN, np.int32)
        positions[:real] = np.arange(real) - first + np.asarray(starts, np.int64)[row]
        numbers = np.full(size, UNKNOWN, np.int32)
        numbers[:real] = np.asarray(requests, np.int64)[row]
        phases = np.full(size, PADDING, np.uint8)
        decodes = positions[:real] >= np.asarray(decode_from, np.int64)[row]
        phases[:real] = np.where(decodes, DECODE, PREFILL)
        return BatchTokens(phases, numbers, positions)

    def __len__(self) -> int:
        return len(self.phases)

    @property
    def stage(self) -> Stage:
        """`mixed` for prefill with decode; `decode` for padding alone, as run to keep step with others."""
        if self.prefill_tokens and self.decode_tokens:
            return "mixed"
        return "prefill" if self.prefill_tokens else "decode"

    def counted_requests(self) -> tuple[int, int]:
        """Return (number of requests, number of those with a prefill token)."""
        known = self.requests != UNKNOWN
        prefill = np.unique(self.requests[known & (self.phases == PREFILL)])
        return len(np.unique(self.requests[known & (self.phases != PADDING)])), len(prefill)

    def as_tensor(self) -> Tensor:
        """Return the phases as a [T] uint8 tensor on the host."""
        return torch.from_numpy(self.phases)


TokenProvider = Callable[[], BatchTokens | None]


class TokenSource:
    """Source of the tokens of each forward. Asked once per forward; raises nothing into it."""

    def __init__(self) -> None:
        self.provider: TokenProvider | None = None
        """Called for the tokens of each recorded forward; returns None where it does not know them."""
        self.next: BatchTokens | None = None
        """Tokens of the next forward, which take precedence over the provider."""
        self._failed = False

    @property
    def tells(self) -> bool:
        """Whether tokens or a provider are set."""
        return self.provider is not None or self.next is not None

    def take(self, *, wanted: bool) -> BatchTokens | None:
        """Return the tokens of the forward that begins, or None.

        Args:
            wanted: whether the forward is recorded; if not, the provider is not called.
        """
        tokens, self.next = self.next, None
        if tokens is None and wanted and self.provider is not None:
            try:
                tokens = self.provider()
            except Exception as error:
                if not self._failed:
                    warn_user(
                        f"the tokens of a forward are unknown ({type(error).__name__}: {error}); its "
                        "stages and requests are unknown"
                    )
                self._failed = True
        return tokens
