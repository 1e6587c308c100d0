"""What a host framework tells of the tokens of a forward: whose each is, and which part of whose work.

Servers batch tokens of many requests in one dimension, some that prefill, some that decode, and pad them to
the size of a CUDA graph. Nothing in the arguments of the model's forward says which is which.
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
"""Phases of a token. A padding mask is one of these: its True is 1 too."""

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class BatchTokens:
    """The T tokens of one forward, in the order in which its routers see them.

    Raises:
        ValueError: arrays of different lengths, or an unknown phase.
    """

    phases: npt.NDArray[np.uint8]
    """[T] `PREFILL`, `DECODE` or `PADDING`."""
    requests: Ints
    """[T] a number of each token's request, which it keeps for its life; `UNKNOWN` for padding."""
    positions: Ints
    """[T] position of each within its request, from 0; `UNKNOWN` for padding."""
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
        """Tokens that stand together by request, one request after the other, and padding behind them.

        Args:
            requests: [R] number of each request.
            tokens: [R] its tokens in this forward.
            starts: [R] position of the first of them within the request.
            decode_from: [R] its tokens from this position on are decoded: for a request that was never
                interrupted, the length of its prompt.
            size: T, with padding; None for none.

        Raises:
            ValueError: more tokens than `size`, or fewer than none.
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
        """`mixed` where some tokens prefill and some decode; `decode` for padding alone, as what a server
        runs to keep step with others is."""
        if self.prefill_tokens and self.decode_tokens:
            return "mixed"
        return "prefill" if self.prefill_tokens else "decode"

    def counted_requests(self) -> tuple[int, int]:
        """(requests, those of them with a prefill token)."""
        known = self.requests != UNKNOWN
        prefill = np.unique(self.requests[known & (self.phases == PREFILL)])
        return len(np.unique(self.requests[known & (self.phases != PADDING)])), len(prefill)

    def as_tensor(self) -> Tensor:
        """[T] uint8, the phases, on the host."""
        return torch.from_numpy(self.phases)


TokenProvider = Callable[[], BatchTokens | None]


class TokenSource:
    """Who tells the tokens of each forward. Asked once a forward; never raises into it."""

    def __init__(self) -> None:
        self.provider: TokenProvider | None = None
        """Asked for the tokens of each forward that is recorded; returns None where it does not know."""
        self.next: BatchTokens | None = None
        """Of the next forward, in place of what the provider would tell."""
        self._failed = False

    @property
    def tells(self) -> bool:
        """Whether there is anything to ask."""
        return self.provider is not None or self.next is not None

    def take(self, *, wanted: bool) -> BatchTokens | None:
        """The tokens of the forward that begins.

        Args:
            wanted: whether it is recorded; else a provider is not asked.
        """
        told, self.next = self.next, None
        if told is None and wanted and self.provider is not None:
            try:
                told = self.provider()
            except Exception as error:
                if not self._failed:
                    warn_user(
                        f"the tokens of a forward are unknown ({type(error).__name__}: {error}); its "
                        "stages and requests are unknown"
                    )
                self._failed = True
        return told
