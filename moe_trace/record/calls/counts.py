"""What became of the calls of a router."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class SiteCounts:
    """What became of the calls of one router."""

    seen: int = 0
    recorded: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """By reason (`LOST_CALLS` in `data/summary_notes.py`)."""
    misread: str | None = None
    """Why the first call that could not be read could not."""
    fused: int = 0
    """Calls of a block that called neither its router nor its experts."""
