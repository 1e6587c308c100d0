"""Plain text tables aligned for a terminal, without control codes."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence

WIDTH = 80
_MIN_WIDTH = 40


def screen_width() -> int:
    """Return `WIDTH`, or less if the terminal or `COLUMNS` is narrower."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return WIDTH
    return max(_MIN_WIDTH, min(WIDTH, shutil.get_terminal_size().columns))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Format columns two blanks apart; the first `left` are aligned left, the others right.

    On a terminal narrower than `WIDTH`, columns that do not fit follow below, each time after the first.
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
    """Return the column indices of each block."""
    if screen >= WIDTH or not widths:
        return [list(range(len(widths)))]
    blocks = [[0]]
    for i in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[j] + 2 for j in blocks[-1]) + widths[i] > screen:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


def pad(text: str, width: int, *, to_left: bool) -> str:
    """Pad with blanks to a width on the screen."""
    blanks = " " * max(0, width - columns(text))
    return text + blanks if to_left else blanks + text


def columns(text: str) -> int:
    """Return the number of terminal columns that the text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def printable(text: object, limit: int = 60) -> str:
    """Return text from a file without control codes and at most `limit` characters long."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """Format with significant digits; `-` for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}"


def number_ranges(numbers: Sequence[int]) -> list[str]:
    """Format ascending numbers, neighbours as ranges, to keep long lists readable: `0-2`, `5`, `7-9`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ["-".join(map(str, ends)) for ends in found]


def fixed(value: float | None, decimals: int) -> str:
    """Format with a fixed number of decimals; `-` for None."""
    return "-" if value is None else f"{value:,.{decimals}f}"


def scaled(value: float | None, unit: str = "") -> str:
    """Format with a decimal prefix, such as `1.23 G`; `-` for None."""
    if value is None:
        return "-"
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def share(part: float | None) -> str:
    """Format a fraction as a percentage; `-` for None."""
    if part is None:
        return "-"
    percent = 100 * part
    return f"{percent:.1f} %" if percent >= 0.1 or percent == 0 else "<0.1 %"


def signed_percent(part: float | None) -> str:
    """Format a relative difference in percent; `-` for None."""
    return "-" if part is None else f"{100 * part:+.1f} %"


def wrapped(text: str, mark: str = "  - ") -> str:
    """Wrap a list item to the screen width, its first line marked."""
    indent = " " * len(mark)
    return textwrap.fill(
        text, screen_width(), initial_indent=mark, subsequent_indent=indent, break_on_hyphens=False
    )


def paragraph(text: str) -> str:
    """Wrap text to the screen width."""
    return wrapped(text, "")
