"""What a figure is: a plotly specification (dicts, without plotly itself) and the words that say the same.

The HTML report and the TensorBoard tab draw the same ones. Names come from a file, and plotly reads a subset
of HTML in texts, so every name is escaped here. Colours that depend on the theme are left to the page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None
Spec = dict[str, Any]

POINTS_MAX = 2000  # per line
TABLE_ROWS_MAX = 200

# Okabe and Ito's palette, told apart by readers with any kind of colour vision, on light and dark.
PHASE_COLOURS = {
    "router": "#0072B2",
    "dispatch": "#E69F00",
    "experts": "#009E73",
    "combine": "#CC79A7",
    "shared": "#56B4E9",
    "other": "#999999",
    "gap": "rgba(128,128,128,0.25)",
}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One position of a figure's slider."""

    label: str
    z: list[list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot with the words and the table that say the same."""

    key: str
    title: str
    caption: str
    """What is shown and how to read it."""
    data: list[Spec]
    layout: Spec
    headings: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    frames: list[Frame] = field(default_factory=list)
    """For a slider; the first is what `data` shows."""


def safe(name: object) -> str:
    """A name fit for a plotly text."""
    return html.escape(str(name)[:80])


def layer_colour(index: int, count: int) -> str:
    """From blue over green to orange along the depth of the model, all readable on light and dark."""
    hue = 220 - 190 * index / max(1, count - 1)
    return f"hsl({hue:.0f}, 65%, 50%)"
