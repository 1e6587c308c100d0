"""Load balance statistics: how unevenly assignments spread over experts, next to bounds and chance.

Uniform routing: each token t chooses k_t distinct experts of E, all sets equally likely, tokens independent.
With the loads n_e, their mean m, a_t = k_t (E - k_t), and the spread Q = sum over experts of (n_e - m)^2:

    mean of Q       sum_t a_t / E
    variance of Q   2 ((sum_t a_t)^2 - sum_t a_t^2) / (E^2 (E - 1))

Both are exact for any number of tokens: sum n_e^2 = sum_t k_t + 2 sum_{t<u} |S_t and S_u|; the overlap of
two random sets is hypergeometric with mean k_t k_u / E and variance a_t a_u / (E^2 (E - 1)), and the
overlaps of different pairs are uncorrelated. A single token gives the same Q whatever it chooses, so it
carries no information. Where the expected overlap is below 200 experts, the p-value comes from simulating
uniform routing (fixed seed); above that from the chi-square of this mean and variance, by Wilson and
Hilferty's cube root (PNAS 17:684, 1931), with which simulations agree there.

Tokens of one text are not independent: neighbouring tokens choose similar experts. A load is therefore called
more uneven than chance only if it still is when runs of `TOKENS_ALIKE` tokens count as one choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace.data.calls.ragged import CountLists

Floats = npt.NDArray[np.float64]

TIE = 1e-9
"""Relative difference below which the values of two layers are considered equal."""
SIGNIFICANT = 0.001
"""Largest p-value considered more than chance: with tens of layers, one report in fifty is wrong."""
TOKENS_ALIKE = 20
"""Tokens of a text that carry as much information as one independent token: the variance of expert counts
between pieces of a text, over that of independent tokens (measured: docs/metrics.md)."""
OVERLAPS_MIN = 200
DRAWS_MAX = 10_000
KEYS_MAX = 10_000_000
"""Maximum number of random values that a simulation draws."""
_CALLS_AT_ONCE = 1024
ENOUGH_PER_EXPERT = 20
"""Least mean load at which an expert without tokens is called dead; by chance one is missed in e^-20."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Load statistics of one router; None where there was no assignment."""

    max_over_mean: float | None
    """Assignments of the busiest expert over the mean: 1 is even, E / K has every token on one expert."""
    cv: float | None
    """Population standard deviation over the mean."""
    gini: float | None
    """0 for equal loads, (E - 1) / E when one expert takes all."""
    entropy: float | None
    """Entropy of the shares over ln E: 1 is even, 0 is all on one expert."""
    active_experts: int
    dead_experts: tuple[int, ...]
    """Ids of the experts without assignments; meaningful only where `Chance.tells_dead`."""


def describe_load(assignments: npt.ArrayLike) -> Load:
    """Return the load statistics of assignments per expert, [E]."""
    loads_E = np.asarray(assignments, dtype=np.float64)
    dead = tuple(np.flatnonzero(loads_E == 0).tolist())
    has_load = np.add.reduce(loads_E) > 0
    figures = [float(one_N[0]) for one_N in load_figures(loads_E[None])] if has_load else [None] * 4
    max_over_mean, cv, gini, entropy = figures
    return Load(
        max_over_mean=max_over_mean,
        cv=cv,
        gini=gini,
        entropy=entropy,
        active_experts=len(loads_E) - len(dead),
        dead_experts=dead,
    )


@dataclass(frozen=True, eq=False)
class Loads:
    """`Load` of N calls by column; NaN where there was no assignment."""

    max_over_mean: Floats
    cv: Floats
    gini: Floats
    entropy: Floats
    active_experts: npt.NDArray[np.int64]


def describe_loads(assignments: CountLists) -> Loads:
    """Return the statistics of `describe_load`, bit for bit, for many calls at once."""
    figures = np.full((4, len(assignments)), np.nan)
    sizes, has_load = assignments.sizes, assignments.totals() > 0
    for experts in set(sizes[has_load].tolist()):
        same_size = np.flatnonzero(has_load & (sizes == experts))
        for start in range(0, len(same_size), _CALLS_AT_ONCE):
            rows = same_size[start : start + _CALLS_AT_ONCE]
            loads_NE = assignments.take(rows).values.reshape(-1, experts).astype(np.float64)
            figures[:, rows] = load_figures(loads_NE)
    max_over_mean, cv, gini, entropy = figures
    return Loads(max_over_mean, cv, gini, entropy, assignments.used())


def max_over_mean(loads_E: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> float:
    """Return the largest load over the mean load; at least one must not be 0."""
    return float(np.maximum.reduce(loads_E) / (np.add.reduce(loads_E) / len(loads_E)))


def load_figures(loads_NE: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return max÷mean, CV, Gini and entropy, [N] each, of loads that are not all 0.

    The Gini coefficient is sum_i (2i - E - 1) x_i / (E sum x), x ascending, i from 1; the entropy is
    -sum p ln p / ln E, and 1 for a single expert, whose load cannot be uneven.
    """
    experts = loads_NE.shape[1]
    sum_N = np.add.reduce(loads_NE, axis=1)
    mean_N = sum_N / experts
    off_NE = loads_NE - mean_N[:, None]  # as in `numpy.std`, which is far slower on few numbers
    weighted_N = np.add.reduce(_gini_weights(experts) * np.sort(loads_NE, axis=1), axis=1)
    return (
        np.maximum.reduce(loads_NE, axis=1) / mean_N,
        np.sqrt(np.add.reduce(off_NE * off_NE, axis=1) / experts) / mean_N,
        np.maximum(0.0, weighted_N / (experts * sum_N)),
        _entropy(loads_NE, sum_N),
    )


@functools.lru_cache(maxsize=16)
def _gini_weights(n: int) -> npt.NDArray[np.int64]:
    return 2 * np.arange(1, n + 1) - n - 1


def _entropy(loads_NE: Floats, sum_N: Floats) -> Floats:
    """Sum over the experts in use only, because a sum over all experts would round differently."""
    entropy_N = np.ones(len(loads_NE))
    used_NE = loads_NE > 0
    used_N = np.add.reduce(used_NE, axis=1)
    for used in set(used_N.tolist()) if loads_NE.shape[1] > 1 else ():
        rows = (used_N == used).nonzero()[0]
        shares = loads_NE[rows][used_NE[rows]].reshape(-1, used) / sum_N[rows, None]
        entropy_N[rows] = -np.add.reduce(shares * np.log(shares), axis=1) / np.log(loads_NE.shape[1])
    return np.maximum(0.0, entropy_N)


# -- chance ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Reference values for a router's load; None where unknown."""

    floor: float | None
    """Least possible max÷mean: 1, or more where there are fewer assignments than experts."""
    ceiling: float | None
    """Largest possible max÷mean, E / K, as no expert gets more than all tokens; E if several slots of a token
    may choose the same expert."""
    cv: float | None
    """Root mean square of the CV under uniform routing of the same tokens."""
    cv_clustered: float | None
    """The same if tokens choose alike in runs of `TOKENS_ALIKE`, as in text."""
    cv_beyond: float | None
    """sqrt(CV^2 - chance CV^2), at least 0: the CV of the router's preferences, for any number of tokens."""
    p_value: float | None
    """Probability that uniform routing is at least as uneven; None if all routings of so few tokens are."""
    p_value_clustered: float | None
    """The same if tokens choose alike in runs of `TOKENS_ALIKE`; None below two runs."""
    tells_dead: bool
    """Whether there are enough assignments to call an expert without any dead."""

    @property
    def is_real(self) -> bool:
        """Whether the load is more uneven than chance on text, whose neighbouring tokens choose alike."""
        return self.p_value_clustered is not None and self.p_value_clustered < SIGNIFICANT

    @property
    def says_nothing(self) -> bool:
        """Whether there are too few tokens to distinguish an even router from an uneven one."""
        return self.p_value_clustered is None


def describe_chance(assignments: npt.ArrayLike, k_histogram: npt.ArrayLike) -> Chance:
    """Compare assignments per expert, [E], with their bounds and with chance.

    Args:
        k_histogram: [K + 1] number of tokens by the number of slots they used.
    """
    loads_E = np.asarray(assignments, dtype=np.float64)
    tokens_K = np.asarray(k_histogram, dtype=np.float64)
    experts, slots = len(loads_E), float(loads_E.sum())
    tells_dead = experts > 0 and slots >= ENOUGH_PER_EXPERT * experts
    tokens = float(tokens_K[1:].sum())
    if not slots:
        unknown = dict.fromkeys(
            ("floor", "ceiling", "cv", "cv_clustered", "cv_beyond", "p_value", "p_value_clustered")
        )
        return Chance(**unknown, tells_dead=tells_dead)
    if float((np.arange(len(tokens_K)) * tokens_K).sum()) != slots or loads_E.max() > tokens:
        # A token's slots may choose the same expert, so each assignment counts as an independent choice.
        tokens_K, tokens = np.array([0.0, slots]), slots
    mean = slots / experts
    found = float(((loads_E - mean) ** 2).sum())
    uniform = _Uniform.of(experts, tokens_K)
    runs = _Uniform.of(experts, tokens_K // TOKENS_ALIKE)
    cv_squared, chance_squared = (q / experts / mean**2 for q in (found, uniform.mean))
    return Chance(
        floor=math.ceil(mean) / mean,
        ceiling=tokens / mean,
        cv=math.sqrt(chance_squared),
        cv_clustered=math.sqrt(experts * runs.mean) / runs.slots if runs.slots else None,
        cv_beyond=math.sqrt(max(0.0, cv_squared - chance_squared)),
        p_value=uniform.p_value(found),
        p_value_clustered=runs.p_value(found * (runs.slots / slots) ** 2),
        tells_dead=tells_dead,
    )


@dataclass(frozen=True, eq=False)
class _Uniform:
    """Distribution of the spread Q under uniform routing."""

    experts: int
    tokens_K: tuple[int, ...]
    mean: float
    variance: float

    @classmethod
    def of(cls, experts: int, tokens_K: npt.NDArray[np.float64]) -> _Uniform:
        """Return the distribution for tokens by number of slots."""
        choices_K = np.arange(len(tokens_K))
        spread_K = (choices_K * (experts - choices_K)).astype(np.float64)
        total = float((spread_K * tokens_K).sum())
        pairs = total**2 - float((spread_K**2 * tokens_K).sum())
        variance = 2 * pairs / (experts**2 * (experts - 1)) if experts > 1 else 0.0
        return cls(experts, tuple(tokens_K.astype(int).tolist()), total / experts, variance)

    @property
    def slots(self) -> int:
        return sum(k * n for k, n in enumerate(self.tokens_K))

    def p_value(self, found: float) -> float | None:
        """Return the probability of a spread of at least `found`; None if the spread cannot vary."""
        if self.variance <= 1e-9 * self.mean**2:
            return None
        tokens = sum(self.tokens_K)
        if self.slots**2 * (tokens - 1) / tokens / self.experts / 2 < OVERLAPS_MIN:
            drawn = _simulated(self.experts, self.tokens_K)
            return float((1 + (drawn >= found * (1 - 1e-9)).sum()) / (1 + len(drawn)))
        width = self.variance / (9 * self.mean**2)  # 2 / (9 degrees of freedom)
        z = ((found / self.mean) ** (1 / 3) - (1 - width)) / math.sqrt(width)
        return 0.5 * math.erfc(z / math.sqrt(2))


def most_uneven(chances: Sequence[Chance]) -> list[int]:
    """Return the positions of the loads most uneven beyond chance (`cv_beyond`).

    Several if they tie; none if no load is more uneven than uniform routing of the same tokens.
    """
    beyond = [chance.cv_beyond or 0.0 if chance.is_real else 0.0 for chance in chances]
    most = max(beyond, default=0.0)
    return [i for i, value in enumerate(beyond) if value > 0 and value >= most * (1 - TIE)]


@functools.lru_cache(maxsize=16)
def _simulated(experts: int, tokens_K: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return Q, [draws], of simulated uniform routing."""
    random = np.random.default_rng(0)
    choices_T = np.repeat(np.arange(len(tokens_K)), tokens_K)
    draws = max(1, min(DRAWS_MAX, KEYS_MAX // (experts * len(choices_T))))
    loads_DE = np.zeros((draws, experts))
    for choices in choices_T:
        keys_DE = random.random((draws, experts))
        if choices < experts:
            loads_DE += keys_DE < np.partition(keys_DE, choices, axis=1)[:, choices : choices + 1]
    return ((loads_DE - loads_DE.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
