"""Router calls as CSV: one row per call; counts per expert as blank-separated numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from moe_trace.read.analysis import TraceSummary
from moe_trace.read.rows import call_rows


def render_csv(summaries: Sequence[TraceSummary]) -> str:
    """RFC 4180 with a heading; empty fields where a figure is not known."""
    rows = [{"trace": s.trace, **row} for s in summaries for row in call_rows(s.samples, s.times, s.busy_us)]
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"  # a spreadsheet would run it as a formula
    return value
