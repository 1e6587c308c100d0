"""Figures and numbers as JSON for the page: each number with its text, formatted once, in Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moe_trace.data.display.tables import share
from moe_trace.show.figures.figure import TABLE_ROWS_MAX, Cell, Figure

Plain = dict[str, Any]


def plain_figure(figure: Figure) -> Plain:
    """The plot's specification and the table that says the same."""
    return {
        "key": figure.key,
        "title": figure.title,
        "caption": figure.caption,
        "data": figure.data,
        "layout": figure.layout,
        "table": plain_table(figure.headings, figure.rows),
    }


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Plain:
    """Cells are texts, or [text, number]."""
    return {
        "headings": [heading.strip() for heading in headings],
        "rows": [
            [plain_cell(cell, heading) for cell, heading in zip(row, headings, strict=True)]
            for row in rows[:TABLE_ROWS_MAX]
        ],
        "more": max(0, len(rows) - TABLE_ROWS_MAX),
    }


def plain_cell(cell: Cell, heading: str = "") -> str | list[Any]:
    """A number keeps its value beside its text, so that the page can be checked against the report."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if heading.endswith("share") and not heading.startswith("×"):
        return [share(cell), cell]
    if heading == "relative":
        return [f"{100 * cell:+.1f} %", cell]
    return [number_text(cell), cell]


def number_text(value: float) -> str:
    """Thousands set apart, four significant digits."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def figures_by_key(figures: Iterable[Figure]) -> dict[str, Plain]:
    """Ready to be drawn, in order."""
    return {figure.key: plain_figure(figure) for figure in figures if figure.data}
