"""Consoles of one width and without control codes where nobody watches."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console

WIDTH = 80


def console(stream: TextIO | None = None) -> Console:
    """A rich console; 80 columns and plain text unless the stream is a terminal."""
    stream = stream or sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, width=WIDTH, highlight=False, no_color=True, force_terminal=False)
