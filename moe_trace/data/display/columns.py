"""Definition, unit and number format of each table column.

Text, HTML report, tab and notebook take definition and format from here. A heading names one column, or
several combined with units, clocks and steps: `host p95 µs` contains `host` and `p95`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial

from moe_trace.data.display.tables import (
    fixed,
    number,
    paragraph,
    printable,
    scaled,
    share,
    signed_percent,
    table,
)

Cell = str | int | float | None


def number_text(value: float) -> str:
    """Format a number with thousands separators or four significant digits."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


@dataclass(frozen=True, eq=False)
class Column:
    """One column of a table."""

    label: str
    definition: str = ""
    text: Callable[[float], str] = number_text
    unit: str = ""
    terminal: Callable[[float], str] = number
    """Like `text`, where width is scarce; integers are written out."""
    width: int = 60
    """Maximum width of texts in a terminal."""

    def cell(self, value: str | float | None) -> str:
        """Return a cell's text; `-` for unknown values (None and NaN)."""
        if value is None or value != value:
            return "-"
        return value if isinstance(value, str) else self.text(value)

    def described(self) -> dict[str, str]:
        """Return the description stored in files and data frames."""
        return {"label": self.label, "unit": self.unit, "definition": self.definition}

    def terminal_cell(self, value: Cell) -> str:
        """Return a cell's text for a table in a terminal."""
        if value is None or value != value:
            return "-"
        if isinstance(value, str):
            return printable(value, self.width)
        return f"{value:,}" if isinstance(value, int) and self.terminal is number else self.terminal(value)


def text_table(
    headings: Sequence[str | Column], rows: Sequence[Sequence[Cell]], *, left: int = 1, title: str = ""
) -> str:
    """Format values as a `table` below a title, each value as its column specifies."""
    columns = columns_of(headings)
    cells = [[c.terminal_cell(value) for c, value in zip(columns, row, strict=True)] for row in rows]
    text = table([column.label for column in columns], cells, left=left)
    return f"{paragraph(title)}\n{text}" if title else text


def columns_of(headings: Iterable[str | Column]) -> list[Column]:
    """Return the columns of a table, given as columns or as headings that name them."""
    return [heading if isinstance(heading, Column) else column_of(heading) for heading in headings]


DEFINITIONS = {
    "MoE of the device's work": "Kernel time launched inside the MoE blocks, forward and backward, over all "
    "kernel time in the trace.",
    "MoE of the host's work": "Time in operators inside the MoE blocks over all time in operators: the trace "
    "has no kernels.",
    "most uneven layer, max÷mean": "The busiest expert's assignments over the mean of its layer, for "
    "the layer whose load is most uneven beyond what uniform routing of as many tokens gives. 1 is even, E/K "
    "is the most.",
    "dead experts": "Experts that got no assignment in any call of the trace, over all layers with at least "
    "20 assignments an expert.",
    "router confidence": "1 − H/ln E of the softmax of the router's logits, mean over tokens, then over "
    "layers. 0 is undecided, 1 is certain.",
    "expert FLOP/s": "FLOPs of the routed experts, by formula from the recorded counts, over the device busy "
    "time of the experts phase (on a CPU: its time in operators), without gaps.",
    "steps": "Profiler steps that hold at least one recorded call.",
    "calls": "Forward calls of the router.",
    "tokens": "Router calls × their tokens: a token counts once for each MoE layer.",
    "assignments": "(token, expert) pairs that the routers chose.",
    "max÷mean": "The busiest expert's assignments over the mean of its layer: 1 is even.",
    "CV": "Population standard deviation of the experts' assignments over their mean: 0 is even.",
    "Gini": "0 for equal loads, (E − 1)/E when one expert takes all.",
    "entropy": "Entropy of the experts' shares over ln E: 1 is even, 0 is all on one expert.",
    "active": "Experts that got at least one assignment.",
    "busiest expert": "The expert with the most assignments.",
    "× equal share": "An expert's assignments over the mean of its layer: 1× is an equal share.",
    "skipped": "Slots whose index is out of range, or whose weight is exactly 0.",
    "padding": "Assignments made by padding tokens, as the model's attention mask tells.",
    "router entropy": "Entropy of the softmax of the router's logits, in nats, mean over tokens: 0 is "
    "certain, ln E is no preference at all.",
    "router": "The router's own range: logits, softmax, top-k.",
    "dispatch": "From the router to the first product of the experts: sort, gather, all-to-all.",
    "experts": "From the experts' first product to their last, activation included.",
    "combine": "After the experts' last product: weighting, scatter, sum, all-to-all.",
    "shared": "Products outside router and routed experts: shared experts.",
    "other": "The rest of the block.",
    "block": "The MoE block: router, routed and shared experts, and what moves tokens between them.",
    "backward": "Of the backward pass, joined by Kineto's forward-backward links.",
    "gap": "Time of the block in which none of its kernels (on the host: no operator) ran.",
    "host": "Time on the CPU thread that launches the work.",
    "device busy": "Sum of the kernels launched inside the range.",
    "device span": "From the range's first kernel to its last, gaps included.",
    "p50": "Half of the calls are at most this long.",
    "p95": "95 % of the calls are at most this long.",
    "phase": "The part of the MoE call that a kernel or operator belongs to, by the structure of the "
    "operators round it.",
    "layers": "In how many MoE layers it ran.",
    "count": "How many of them touch the range.",
    "total µs": "Their time added up, not cut off where the range ends.",
    "stretches": "How many parts are drawn; neighbours may be drawn as one.",
    "interval": "99 % bootstrap interval of B − A, over calls. A change counts if it leaves out 0.",
    "verdict": "changed: the interval leaves out 0. noise: it does not. few calls: under 5 on a side, so it "
    "is unknown.",
    "MoE work": "Device busy time of the MoE blocks, forward and backward (on a CPU: time in operators).",
    "GB/s": "Bytes that leave the rank over the time of its collectives without waiting; 1 GB is 1e9 bytes.",
    "bytes": "What went into the collectives, the rank's own part included.",
    "bytes leaving": "What went into the collectives for other ranks.",
    "wait µs": "From a rank's arrival at a collective to that of the last, on the aligned clock.",
    "waited for": "The rank that arrived last, weighted by how long the others waited for it.",
    "part": "counts: how many slots follow. dispatch: slots to their experts' ranks. combine: results back.",
    "hot rank": "The rank whose experts get the most slots of the layer.",
    "hot expert": "The busiest expert of that rank, and its share of the rank's slots.",
    "straggler": "The rank with the most MoE work, without what its kernels waited for others where that is "
    "known. The others wait for it.",
}
_FORMATS = {"share": share, "relative": signed_percent, "change": signed_percent}
_DECIMALS = {
    **dict.fromkeys(("max÷mean", "CV", "chance", "Gini", "entropy", "confidence"), 3),
    **dict.fromkeys(("load entropy", "router entropy", "router confidence", "moved"), 3),
}
"""Decimals in a terminal, where values are compared down a column."""
_WIDTHS = {"layer": 12, "run": 16, "config": 24, "text": 16, "differs": 24, "A": 24, "B": 24}
_UNITS = ("µs", "GB/s", "FLOP/s", "%")
_UNITS_BY_NAME = {
    **dict.fromkeys(("assignments", "skipped", "padding"), "slots"),
    **{"router entropy": "nats", "active": "experts", "tokens": "tokens"},
}


def column_of(heading: str) -> Column:
    """Return the column that a heading names; a column with the heading as its label if none is known."""
    words = heading.strip()
    if words in DEFINITIONS:
        definition = DEFINITIONS[words]
    else:
        named = [label for label in DEFINITIONS if f" {label} " in f" {words} "]
        parts = [label for label in named if not any(label != other and label in other for other in named)]
        definition = " ".join(f"{label}: {DEFINITIONS[label]}" for label in parts)
    last = words.rpartition(" ")[2]
    is_ratio = words.startswith("×")  # "× equal share" is a multiple, not a fraction
    text = number_text if is_ratio else _FORMATS.get(last, number_text)
    terminal = partial(fixed, decimals=_DECIMALS[words]) if words in _DECIMALS else _FORMATS.get(last, number)
    unit = last if last in _UNITS else _UNITS_BY_NAME.get(words, "")
    return Column(words, definition, text, unit, terminal, _WIDTHS.get(words, 60))


def as_column(
    label: str, definition: str = "", unit: str = "", terminal: Callable[[float], str] = number
) -> dict[str, Column]:
    """Return field metadata for a dataclass field that is a column; see `columns_of_fields`."""
    return {"column": Column(label, definition, unit=unit, terminal=terminal)}


def columns_of_fields(kind: type) -> dict[str, Column]:
    """Return a mapping from field name to column, in the order of the fields."""
    return {field.name: field.metadata["column"] for field in fields(kind)}


def count_column(label: str, unit: str = "") -> Column:
    """Return a column for numbers from units to billions: FLOP, bytes, FLOP/s."""
    return Column(label, terminal=partial(scaled, unit=unit), text=partial(scaled, unit=unit))
