"""How evenly assignments spread over experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Load:
    """Figures of one router's load; None where there was no assignment."""

    max_over_mean: float | None
    """Largest expert's assignments over the mean: 1 is even, E is all on one."""
    cv: float | None
    """Population standard deviation over the mean."""
    gini: float | None
    """0 for equal loads, (E - 1) / E when one expert takes all."""
    entropy: float | None
    """Entropy of the shares over ln E: 1 is even, 0 is all on one."""
    active_experts: int
    dead_experts: tuple[int, ...]
    """Ids of the experts that got no assignment."""


def describe_load(assignments: npt.ArrayLike) -> Load:
    """The figures for `[E]` assignments per expert."""
    loads_E = np.asarray(assignments, dtype=np.float64)
    total = loads_E.sum()
    dead = tuple(int(i) for i in np.flatnonzero(loads_E == 0))
    active = len(loads_E) - len(dead)
    if total <= 0:
        return Load(
            max_over_mean=None, cv=None, gini=None, entropy=None, active_experts=active, dead_experts=dead
        )
    return Load(
        max_over_mean=max_over_mean(loads_E),
        cv=coefficient_of_variation(loads_E),
        gini=gini(loads_E),
        entropy=normalised_entropy(loads_E),
        active_experts=active,
        dead_experts=dead,
    )


def max_over_mean(loads_E: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> float:
    """Largest load over the mean load; not all are 0."""
    return float(loads_E.max() / loads_E.mean())


def coefficient_of_variation(loads_E: npt.NDArray[np.float64]) -> float:
    """Population standard deviation over the mean; not all are 0."""
    return float(loads_E.std() / loads_E.mean())


def gini(loads: Any) -> float:
    """Gini coefficient of non-negative loads: sum_i (2i - n - 1) x_i / (n sum x), x ascending, i from 1."""
    ordered = np.sort(np.asarray(loads, dtype=np.float64))
    n = len(ordered)
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return max(0.0, float((ranks * ordered).sum() / (n * ordered.sum())))


def normalised_entropy(loads: Any) -> float:
    """-sum p ln p / ln n; 1 for a single load, which cannot be uneven."""
    values = np.asarray(loads, dtype=np.float64)
    if len(values) == 1:
        return 1.0
    shares = values[values > 0] / values.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum() / np.log(len(values))))
