"""A comparison of two recordings as text and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from moe_trace.data.tables import number, paragraph, printable, table
from moe_trace.read.diff import Change


def render_diff_text(changes: Sequence[Change], *, a: str, b: str, everything: bool = False) -> str:
    """The changes of all layers together, and what changed in single layers."""
    parts = [f"A  {printable(a, 200)}\nB  {printable(b, 200)}"]
    together = [c for c in changes if c.site == "all"]
    parts.append("All layers (latencies and phases in µs; 99 % interval of the change)\n" + _table(together))
    single = [c for c in changes if c.site != "all" and (everything or c.verdict == "changed")]
    for site in dict.fromkeys(change.site for change in single):
        rows = [change for change in single if change.site == site]
        parts.append(f"{printable(site, 40)}\n{_table(rows)}")
    if not single:
        parts.append("No single layer changed beyond noise.")
    if any(c.verdict == "few calls" for c in changes):
        parts.append(
            paragraph("Few calls: under 5 on a side, noise cannot be told from change; record more.")
        )
    return "\n\n".join(parts) + "\n"


def _table(changes: Sequence[Change]) -> str:
    rows = [
        [
            change.metric,
            _value(change.a),
            _value(change.b),
            f"{100 * change.relative:+.1f} %" if change.relative is not None else "-",
            _interval(change),
            change.verdict,
        ]
        for change in changes
        if change.a or change.b
    ]
    return table(("metric", "A", "B", "change", "interval", "verdict"), rows)


def _interval(change: Change) -> str:
    if change.low is None or change.high is None:
        return "-"
    if not change.a:
        return f"{_value(change.low)} to {_value(change.high)}"
    low, high = (100 * value / abs(change.a) for value in (change.low, change.high))
    return f"{low:+.1f} to {high:+.1f} %"


def _value(value: float | None) -> str:
    if value is not None and abs(value) >= 1e6:
        return f"{value:.2e}"
    if value is not None and 0 < abs(value) < 0.001:
        return f"{value:.0e}"
    return number(value)


def render_diff_csv(changes: Sequence[Change]) -> str:
    """One row per layer and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("site", "metric", "a", "b", "difference", "relative", "low", "high", "verdict"))
    for c in changes:
        writer.writerow((c.site, c.metric, c.a, c.b, c.difference, c.relative, c.low, c.high, c.verdict))
    return out.getvalue()
