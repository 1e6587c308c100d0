"""Router calls as CSV, one row per call; counts per expert are separated by blanks."""

from __future__ import annotations

from collections.abc import Sequence

from moe_trace.data.display.csv import csv_text
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.rows import call_rows


def render_csv(summaries: Sequence[TraceSummary]) -> str:
    """Render RFC 4180 CSV with a header row. Fields of unknown metrics are empty."""
    rows = [{"trace": s.trace, **row} for s in summaries for row in call_rows(s.samples, s.times, s.busy_us)]
    return csv_text(list(rows[0]), (list(row.values()) for row in rows)) if rows else ""
