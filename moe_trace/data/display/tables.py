"""Plain tables that line up in a terminal, without control codes."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

WIDTH = 80


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns two blanks apart; the first `left` columns are aligned left, the others right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(columns(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(_cells(line, widths, left)).rstrip() for line in lines)


def _cells(line: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    sized = zip(line, widths, strict=True)
    return [pad(cell, width, to_left=i < left) for i, (cell, width) in enumerate(sized)]


def pad(text: str, width: int, *, to_left: bool) -> str:
    """Blanks up to a width on the screen."""
    blanks = " " * max(0, width - columns(text))
    return text + blanks if to_left else blanks + text


def columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def printable(text: object, limit: int = 60) -> str:
    """A name out of a file, fit for a terminal: no control codes, of bounded length."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; `-` for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}"


def fixed(value: float | None, decimals: int) -> str:
    """A fixed number of decimals; `-` for None."""
    return "-" if value is None else f"{value:,.{decimals}f}"


def scaled(value: float | None, unit: str = "") -> str:
    """`1.23 G` of something."""
    if value is None:
        return "-"
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def share(part: float | None) -> str:
    """A fraction as a percentage; `-` for None."""
    if part is None:
        return "-"
    percent = 100 * part
    return f"{percent:.1f} %" if percent >= 0.1 or percent == 0 else "<0.1 %"


def wrapped(text: str) -> str:
    """An item of a list within `WIDTH`, its first line marked with a dash."""
    return textwrap.fill(text, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def paragraph(text: str) -> str:
    """Text within `WIDTH`."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)
