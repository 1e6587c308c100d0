"""Temporal locality: how soon the tokens of a sequence reuse the same experts.

S_t is the set of experts of token t. All metrics are computed within runs (see `tokens`), on the sets as
recorded: a skipped slot makes a set smaller.

- `lags`: sum_t |S_t and S_(t-d)| / sum_t |S_t| over the tokens with d tokens before them in their run; d = 1
  is the reuse of consecutive tokens. Uniform routing gives k / E; independent tokens with the layer's load
  give sum_e p_e^2 / sum_e p_e, with p_e the share of tokens with e.
- `reuse_within`: the cumulative distribution of the reuse distance, in tokens since the same run last used
  the expert, over all assignments of tokens in runs; the remainder to 1 was never used before.
- `distinct_in_window`: mean of |union of S| over every d consecutive tokens, which a verify step of d
  speculated tokens reads.
- `segment_coverage`: runs are cut into segments of m tokens (an incomplete last one is left out); mean over
  segments of the share of assignments that the c most used experts of that segment cover, for every c. No set
  of c experts that is fixed throughout a segment covers more. (Local routing consistency, arXiv 2505.16056,
  asks this question; its SRP and SCH are defined through a model's scores, and are not computed here.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_trace.read.routes.expert_pairs import ratio
from moe_trace.read.routes.sets import Floats, Ints, Words, total_size
from moe_trace.read.routes.tokens import LayerTokens

SEGMENTS = (16, 128)
_BINS = 1 << 22


@dataclass(frozen=True, eq=False)
class Locality:
    """Temporal locality of one layer; NaN where no run is long enough."""

    distances: Ints
    """[D] distances of 1, 2, 4, ... tokens, up to the longest run."""
    lags: Floats
    """[D] share of a token's experts that the token at that distance before it also used."""
    by_chance: float
    """`lags` under uniform routing: k / E."""
    by_load: float
    """`lags` for independent tokens with this layer's load."""
    reuse_within: Floats
    """[D] share of assignments whose expert the run used within that distance before."""
    distinct_in_window: Floats
    """[D] mean number of distinct experts in that many consecutive tokens."""
    segments: tuple[int, ...]
    """[M] lengths of segments in tokens."""
    segment_coverage: Floats
    """[M, E] share covered by the best 1, 2, ... E experts of each segment."""
    fixed_coverage: Floats
    """[E] share covered by the 1, 2, ... E most used experts of the layer, in all tokens."""

    @property
    def consecutive(self) -> float:
        """Share of a token's experts that the previous token also used."""
        return float(self.lags[0]) if len(self.lags) else float("nan")

    @property
    def first_use(self) -> float:
        """Share of assignments whose expert the run had not used before."""
        return float(1 - self.reuse_within[-1]) if len(self.reuse_within) else float("nan")


def locality(tokens: LayerTokens, segments: tuple[int, ...] = SEGMENTS) -> Locality | None:
    """Compute locality of the tokens with known order, or return None if there are none."""
    if not tokens.order.known.all():
        known = tokens.order.known
        tokens = LayerTokens(tokens.ids[known], tokens.experts, tokens.order.only(known))
    total = tokens.assignments
    if not total:
        return None
    longest = int(tokens.order.place.max(initial=0))
    distances = 1 << np.arange(max(0, longest - 1).bit_length() + 1 if longest else 0)
    figures = np.array([_at_lag(tokens, windows, d) for d, windows in _windows(tokens, distances)])
    lags, reuse, distinct = figures.reshape(-1, 3).T
    shares = ratio(tokens.counts, np.array(len(tokens)))
    return Locality(
        distances=distances,
        lags=lags,
        by_chance=total / len(tokens) / tokens.experts,
        by_load=float((shares**2).sum() / shares.sum()),
        reuse_within=reuse / total,
        distinct_in_window=distinct,
        segments=segments,
        segment_coverage=np.array([_coverage(tokens, length) for length in segments]),
        fixed_coverage=np.cumsum(np.sort(tokens.counts)[::-1]) / total,
    )


def _windows(tokens: LayerTokens, distances: Ints) -> Iterator[tuple[int, Words]]:
    """Yield (d, [N, W] union of the run's last d sets up to each token), updated in place."""
    place, windows = tokens.order.place, tokens.sets.copy()
    for d in distances.tolist():
        yield d, windows
        windows[d:] |= np.where((place[d:] >= d)[:, None], windows[:-d], np.uint64(0))


def _at_lag(tokens: LayerTokens, windows_NW: Words, d: int) -> tuple[float, float, float]:
    """Return overlap at lag d, assignments reused within d, and distinct experts of d consecutive tokens."""
    sets, place = tokens.sets, tokens.order.place
    has_previous = place[d:] >= d
    shared, total = total_size(sets[d:] & sets[:-d], has_previous), total_size(sets[d:], has_previous)
    reused = total_size(sets[1:] & windows_NW[:-1], tokens.order.follows[1:])
    has_window = place >= d - 1
    number = np.count_nonzero(has_window)
    return (
        shared / total if total else float("nan"),
        reused,
        total_size(windows_NW, has_window) / number if number else float("nan"),
    )


def _coverage(tokens: LayerTokens, length: int) -> Floats:
    """Return the mean over complete segments of the share that their best 1, 2, ... experts cover, [E]."""
    experts, place = tokens.experts, tokens.order.place
    ends = np.flatnonzero(place % length == length - 1)
    sums, segments = np.zeros(experts), 0
    at_once = max(1, _BINS // (experts + 1))
    for start in range(0, len(ends), at_once):
        chosen = ends[start : start + at_once]
        rows = chosen[:, None] - np.arange(length - 1, -1, -1)
        ids = tokens.ids[rows].reshape(len(chosen), -1)
        codes = ids + (np.arange(len(chosen)) * (experts + 1))[:, None]
        counts = np.bincount(codes.ravel(), minlength=len(chosen) * (experts + 1))
        counts = counts.reshape(len(chosen), -1)[:, :experts].astype(
            np.uint16 if length < 1 << 8 else np.int64
        )
        totals = counts.sum(axis=1, dtype=np.int64)
        weight = np.divide(1, totals, where=totals > 0, out=np.zeros(len(totals)))
        sums += weight @ np.sort(counts, axis=1)[:, ::-1].astype(np.float64)
        segments += int((totals > 0).sum())
    return np.cumsum(sums) / segments if segments else np.full(experts, np.nan)
