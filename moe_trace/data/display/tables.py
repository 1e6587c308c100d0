"""Plain tables that line up in a terminal, without control codes."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence

WIDTH = 80
_NARROWEST = 40


def screen_width() -> int:
    """`WIDTH`, or less where the output is a terminal that has less, or `COLUMNS` says so."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return WIDTH
    return max(_NARROWEST, min(WIDTH, shutil.get_terminal_size().columns))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns two blanks apart; the first `left` columns are aligned left, the others right.

    On a terminal narrower than `WIDTH`, columns that don't fit follow below, each time after the first one.
    """
    lines = [list(headings), *map(list, rows)]
    widths = [max(columns(line[i]) for line in lines) for i in range(len(headings))]
    blocks = []
    for chosen in _folded(widths, screen_width()):
        for line in lines:
            cells = [pad(line[i], widths[i], to_left=i < left) for i in chosen]
            blocks.append("  ".join(cells).rstrip())
    return "\n".join(blocks)


def _folded(widths: Sequence[int], screen: int) -> list[list[int]]:
    """Indices of the columns of each block."""
    if screen >= WIDTH or not widths:
        return [list(range(len(widths)))]
    blocks = [[0]]
    for i in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[j] + 2 for j in blocks[-1]) + widths[i] > screen:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


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


def number_ranges(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers, neighbours as a range, so that a thousand stay readable: `0-2`, `5`, `7-9`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ["-".join(map(str, ends)) for ends in found]


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


def signed_percent(part: float | None) -> str:
    """A relative difference; `-` for None."""
    return "-" if part is None else f"{100 * part:+.1f} %"


def wrapped(text: str, mark: str = "  - ") -> str:
    """An item of a list within the screen, its first line marked."""
    beside = " " * len(mark)
    return textwrap.fill(
        text, screen_width(), initial_indent=mark, subsequent_indent=beside, break_on_hyphens=False
    )


def paragraph(text: str) -> str:
    """Text within the screen."""
    return wrapped(text, "")
