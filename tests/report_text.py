"""Parse the text report into tables by title, and compare cells with values."""

from __future__ import annotations

import re


def table_in(text: str, title: str) -> dict[str, dict[str, str]]:
    """Rows of the table under a title, by their first cell."""
    found = re.search(rf"^{title}.*?\n(layer [^\n]*(?:\n[^\n]+)*)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    heading, *lines = (re.split(r" {2,}", line.strip()) for line in found[1].splitlines())
    return {line[0]: dict(zip(heading, line, strict=False)) for line in lines}


def shown(cell: str, value: float) -> None:
    """A cell with its unit shows the value, to its last digit."""
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "%": 0.01}
    number, *unit = cell.split()
    if number == "<0.1":
        assert 0 < value < 0.001
        return
    factor = scale[unit[0]] if unit else 1.0
    digits = len(number.partition(".")[2])
    step = 10.0**-digits
    if not digits and number.replace(",", "").isdigit() and len(number.strip("0")) < 3 and unit:
        step = 1.0
    got = float(number.replace(",", "")) * factor
    assert abs(got - value) <= max(0.51 * step * factor, 6e-4 * abs(value) * (unit != [])), (cell, value)
