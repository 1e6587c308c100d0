"""Measurements of several configurations and their comparison. Does not import torch.

Rounds are interleaved (each configuration once per round), so drift, such as of the chip's clock, affects all
configurations alike; ratios are computed within a round.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_trace.data.data_frame import data_frame
from moe_trace.data.display.columns import DEFINITIONS, Cell, as_column, columns_of_fields, text_table
from moe_trace.data.display.csv import csv_text
from moe_trace.data.display.tables import fixed, scaled
from moe_trace.data.files import write_text

CONFIDENCE = 0.95
_TWO, _THREE = partial(fixed, decimals=2), partial(fixed, decimals=3)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A single measurement of one configuration on one text."""

    config: str
    text: str
    tokens: int
    latency_ms: float
    """Wall time of the forward, device included, without any hook of ours."""
    router_ms: float
    """Time of all routers in one hooked forward, by the device's clock."""
    experts_ms: float
    flops_per_token: float
    """FLOPs of routers and routed experts."""
    load_max_over_mean: float
    """Mean over layers."""
    router_confidence: float
    """Mean over layers."""
    k_mean: float
    skipped_share: float
    """Share of all slots that were skipped."""


@dataclass(frozen=True)
class Timed:
    """A metric over rounds, absolute and relative to the first configuration."""

    median: float
    low: float
    """Minimum over rounds."""
    high: float
    """Maximum over rounds."""
    ratio: float
    """Median over rounds of the ratio to the first configuration's value; NaN where that is 0."""
    ratio_low: float
    """Low end of that median's distribution-free interval (order statistics). NaN with a single round."""
    ratio_high: float


@dataclass(frozen=True, kw_only=True)
class ComparedConfig:
    """One line of the table."""

    config: str = field(metadata=as_column("config"))
    text: str = field(metadata=as_column("text", "Name of the text, or `all`."))
    rounds: int = field(metadata=as_column("rounds"))
    tokens: int = field(metadata=as_column("tokens", "Of one round.", "tokens"))
    tokens_per_s: Timed = field(metadata=as_column("tokens/s", terminal=partial(fixed, decimals=0)))
    latency_ms: Timed = field(
        metadata=as_column("latency ms", "Of a forward, the mean over the texts.", "ms")
    )
    router_ms: Timed = field(metadata=as_column("router ms", "All routers of one hooked forward.", "ms"))
    experts_ms: Timed = field(metadata=as_column("experts ms", "All experts of one hooked forward.", "ms"))
    flops_per_token: Timed = field(
        metadata=as_column("FLOP/token", "Routers and routed experts.", "FLOP", scaled)
    )
    load_max_over_mean: Timed = field(metadata=as_column("max÷mean", DEFINITIONS["max÷mean"], terminal=_TWO))
    router_confidence: Timed = field(
        metadata=as_column("confidence", DEFINITIONS["router confidence"], terminal=_THREE)
    )
    k_mean: Timed = field(metadata=as_column("k", "Experts that a token really used.", terminal=_TWO))
    skipped_share: Timed = field(metadata=as_column("skipped", "Of all slots: " + DEFINITIONS["skipped"]))


_COLUMNS_BY_NAME = columns_of_fields(ComparedConfig)
_FIGURES = tuple(_COLUMNS_BY_NAME)[4:]
_STATISTICS = {
    "": ("median", "median of the rounds"),
    "_min": ("low", "smallest of the rounds"),
    "_max": ("high", "largest of the rounds"),
    "_ratio": ("ratio", "over the first configuration's"),
    "_ratio_low": ("ratio_low", "low end of that ratio's interval"),
    "_ratio_high": ("ratio_high", "high end of that ratio's interval"),
}
COLUMNS = {name: _COLUMNS_BY_NAME[name] for name in tuple(_COLUMNS_BY_NAME)[:4]} | {
    name + suffix: replace(
        _COLUMNS_BY_NAME[name],
        label=f"{_COLUMNS_BY_NAME[name].label}, {words}",
        unit="" if "ratio" in suffix else _COLUMNS_BY_NAME[name].unit,
    )
    for name in _FIGURES
    for suffix, (_, words) in _STATISTICS.items()
}
"""Mapping from name in the rows to label, definition and unit."""


class Comparison:
    """Table of results: iterate over rows (dicts), index a column, or export to pandas, CSV or text."""

    def __init__(self, lines: Sequence[ComparedConfig], coverage: float) -> None:
        self.lines = tuple(lines)
        self.interval_coverage = coverage
        """Probability that the interval of a ratio contains its true median, if rounds are independent."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per configuration: the medians, `_min`, `_max`, `_ratio`, `_ratio_low`, `_ratio_high`."""
        return [_row(line) for line in self.lines]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(COLUMNS) if self.lines else []

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]

    def to_df(self) -> Any:
        """Return the rows as a `pandas.DataFrame`; `attrs["columns"]` describes the columns.

        Raises:
            MissingPackage: pandas is not installed; `rows` and `to_csv` do not need it.
        """
        return data_frame(self.rows, COLUMNS)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV, atomically; cells of unknown values are empty."""
        write_text(Path(path), csv_text(self.columns, (list(row.values()) for row in self.rows)))

    def __str__(self) -> str:
        return _render(self)


def compare(measurements: Sequence[Sequence[Measurement]], *, by_text: bool = False) -> Comparison:
    """Reduce rounds of measurements to a line per configuration, or per configuration and text.

    Args:
        measurements: one sequence per round, each with every configuration.
    """
    rounds = [_round_figures(taken, by_text) for taken in measurements]
    first = {key[1]: key for key in reversed(rounds[0])}
    lines = [_compare_one(key, first[key[1]], rounds) for key in rounds[0]]
    return Comparison(lines, interval(np.arange(len(rounds)))[2])


def interval(values: Any) -> tuple[float, float, float]:
    """Return (low, high, coverage) of the median by order statistics: the narrowest pair that covers 95 %.

    With fewer than six values no pair does, and the widest is returned with its actual coverage: 1 - 2 x
    Binomial(n, 1/2)(X < r) for the r-th smallest and r-th largest (David and Nagaraja, Order Statistics,
    section 7.1).
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    if n < 2:
        return math.nan, math.nan, 0.0
    coverage, best = 1 - 2 * 0.5**n, 1
    tail = 0.5**n
    for rank in range(2, n // 2 + 1):
        tail += math.comb(n, rank - 1) * 0.5**n
        if 1 - 2 * tail < CONFIDENCE:
            break
        coverage, best = 1 - 2 * tail, rank
    return float(ordered[best - 1]), float(ordered[n - best]), coverage


_Key = tuple[str, str]
"""Names of configuration and text."""


def _round_figures(taken: Sequence[Measurement], by_text: bool) -> dict[_Key, dict[str, float]]:
    groups: dict[_Key, list[Measurement]] = {}
    for measurement in taken:
        groups.setdefault((measurement.config, measurement.text if by_text else "all"), []).append(
            measurement
        )
    return {key: _figures(group) for key, group in groups.items()}


def _figures(group: Sequence[Measurement]) -> dict[str, float]:
    """Return times as means over the texts, and other metrics as means over tokens."""
    tokens = sum(m.tokens for m in group)
    seconds = sum(m.latency_ms for m in group) / 1000
    timed = {
        name: sum(getattr(m, name) for m in group) / len(group)
        for name in ("latency_ms", "router_ms", "experts_ms")
    }
    counted = {
        name: sum(getattr(m, name) * m.tokens for m in group) / tokens
        for name in ("flops_per_token", "load_max_over_mean", "router_confidence", "k_mean", "skipped_share")
    }
    return {"tokens": tokens, "tokens_per_s": tokens / seconds, **timed, **counted}


def _compare_one(key: _Key, first: _Key, rounds: Sequence[dict[_Key, dict[str, float]]]) -> ComparedConfig:
    def timed(name: str) -> Timed:
        values = np.array([r[key][name] for r in rounds])
        base = np.array([r[first][name] for r in rounds])
        ratios = values / np.where(base == 0, np.nan, base)
        low, high, _ = interval(ratios)
        return Timed(
            median=float(np.median(values)),
            low=float(values.min()),
            high=float(values.max()),
            ratio=float(np.median(ratios)),
            ratio_low=low,
            ratio_high=high,
        )

    (config, text), tokens = key, int(rounds[0][key]["tokens"])
    figures = {name: timed(name) for name in _FIGURES}
    return ComparedConfig(config=config, text=text, rounds=len(rounds), tokens=tokens, **figures)


def _row(line: ComparedConfig) -> dict[str, Any]:
    return {name: getattr(line, name) for name in ("config", "text", "rounds", "tokens")} | {
        name + suffix: getattr(getattr(line, name), part)
        for name in _FIGURES
        for suffix, (part, _) in _STATISTICS.items()
    }


def _render(comparison: Comparison) -> str:
    if not comparison.lines:
        return "no configuration was run"
    label_columns = (
        ("config", "text") if any(line.text != "all" for line in comparison.lines) else ("config",)
    )
    names = [name for name in _FIGURES if name not in ("tokens_per_s", "skipped_share")]
    headings = (
        *label_columns,
        _COLUMNS_BY_NAME["tokens_per_s"],
        "× first",
        *(_COLUMNS_BY_NAME[name] for name in names),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            *(getattr(line, name) for name in label_columns),
            *(line.tokens_per_s.median, _speed(line.tokens_per_s)),
            *(getattr(line, name).median for name in names),
        )
        for line in comparison.lines
    ]
    rounds = comparison.lines[0].rounds
    explain = (
        f"Medians of {rounds} interleaved {'round' if rounds == 1 else 'rounds'}; × first: tokens/s over the "
        f"first configuration's, with its {comparison.interval_coverage:.0%} interval."
    )
    return text_table(headings, rows, left=len(label_columns)) + "\n" + explain


def _speed(speed: Timed) -> str:
    span = "" if math.isnan(speed.ratio_low) else f" ({speed.ratio_low:.2f}-{speed.ratio_high:.2f})"
    return f"{speed.ratio:.2f}{span}"
