"""One definition and one format per column, whatever units and clocks its heading has."""

from __future__ import annotations

import pytest

from moe_trace.data.display.columns import DEFINITIONS, column_of


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
