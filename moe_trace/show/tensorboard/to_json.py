"""Figures and numbers as JSON for the page. Each number comes with its text, formatted once, in Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moe_trace.data.display.columns import Cell, Column, columns_of
from moe_trace.data.display.json import attributes, plain
from moe_trace.show.figures.figure import TABLE_ROWS_MAX, Figure

JsonDict = dict[str, Any]


def plain_figure(figure: Figure) -> JsonDict:
    """Return the specification of the plot and the table of the same data."""
    entries = attributes(figure, "key", "title", "caption", "data", "layout", "frames", "slider")
    return {**entries, "frames": plain(figure.frames), "table": plain_table(figure.headings, figure.rows)}


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> JsonDict:
    """Return a table whose cells are texts or [text, number]."""
    columns = columns_of(headings)
    return {
        "headings": [column.label for column in columns],
        "definitions": [column.definition for column in columns],
        "rows": [
            [plain_cell(cell, column) for cell, column in zip(row, columns, strict=True)]
            for row in rows[:TABLE_ROWS_MAX]
        ],
        "more": max(0, len(rows) - TABLE_ROWS_MAX),
    }


def plain_cell(cell: Cell, column: Column) -> str | list[Any]:
    """Return a cell's text, and the value of a number, so that the page can be checked against the report."""
    text = column.cell(cell)
    return text if cell is None or isinstance(cell, str) else [text, cell]


def figures_by_key(figures: Iterable[Figure]) -> dict[str, JsonDict]:
    """Return the figures that have data, in order."""
    return {figure.key: plain_figure(figure) for figure in figures if figure.data}
