"""Tests that each column has one definition and one format, whatever the units and clocks in its heading."""

from __future__ import annotations

import pytest

from moe_trace.data.display.columns import DEFINITIONS, Column, column_of, count_column, text_table


@pytest.mark.parametrize(
    ("heading", "value", "text"),
    [
        ("CV", 0.123456, "0.1235"),
        ("tokens", 12345, "12,345"),
        ("host gap share", 0.25, "25.0 %"),
        ("relative", -0.5, "-50.0 %"),
        ("× equal share", 1.5, "1.5"),
        ("p95 µs", None, "-"),
        ("part", "x", "x"),
    ],
)
def test_cells_are_written_by_their_column(heading: str, value: float | None, text: str) -> None:
    assert column_of(heading).cell(value) == text


def test_a_heading_is_defined_by_the_words_in_it() -> None:
    column = column_of("host p95 µs")
    assert column.unit == "µs"
    assert DEFINITIONS["host"] in column.definition and DEFINITIONS["p95"] in column.definition
    assert column_of("CV").definition == DEFINITIONS["CV"]
    assert column_of("of another kind").definition == ""


@pytest.mark.parametrize(
    ("heading", "value", "text"),
    [
        ("CV", 0.123456, "0.123"),
        ("calls", 12345, "12,345"),
        ("time µs", 1.23456, "1.23"),
        ("layer", "a name that is longer", "a name that…"),
        (count_column("leaving", "B"), 1_230_000, "1.23 MB"),
        ("wait ms", None, "-"),
    ],
)
def test_a_terminal_writes_the_same_values_shorter(
    heading: str | Column, value: float | None, text: str
) -> None:
    label, cells = text_table([heading], [[value]]).splitlines()
    assert label.strip() == (heading if isinstance(heading, str) else heading.label)
    assert cells.strip() == text
