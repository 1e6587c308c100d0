"""The number of experts that a step reads, as text."""

from __future__ import annotations

from moe_trace.data.display.columns import Cell, Column, number_text, text_table
from moe_trace.data.display.tables import number, paragraph, printable, scaled
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.experts.distinct import DistinctReport


def distinct_part(summary: TraceSummary) -> list[str]:
    """Render a row per number of tokens, and the layers that differ most."""
    report = summary.distinct
    if report is None:
        return []
    headings: list[Column | str] = [Column("tokens"), "calls", "min", "median", "max", "uniform", "of"]
    rows: list[tuple[Cell, ...]] = [
        (size.label, size.calls, size.min, size.median, size.max, size.uniform, number_text(size.experts))
        for size in report.sizes
    ]
    title = "Distinct experts by the tokens of a forward, in all layers' calls (uniform: were all alike)."
    if report.unknown is None:
        headings += [Column("read", terminal=lambda b: scaled(b, "B")), "least µs", "took µs"]
        times = [(size.bytes, size.least_us, size.experts_us) for size in report.sizes]
        rows = [(*row, *cells) for row, cells in zip(rows, times, strict=True)]
        clock = "on the device" if report.on_device else "on the host"
        title += f" Read: their weights, in all layers; took µs: what the experts took {clock}."
    sentences = [_bytes_sentence(report), *_extreme_layers(report)]
    if report.mixed_calls:
        sentences.append(f"{report.mixed_calls:,} of these calls also prefill (mixed); each counts whole.")
    return [text_table(headings, rows, title=title), paragraph(" ".join(sentences))]


def _bytes_sentence(report: DistinctReport) -> str:
    if report.unknown is not None:
        return f"Bytes read: unknown, for {report.unknown}."
    if report.bytes_per_s is None:
        return "Least µs: unknown without the device's memory bandwidth (--peak-gbps gives it)."
    return f"Least µs: those bytes at {scaled(report.bytes_per_s, 'B/s')}, each read once."


def _extreme_layers(report: DistinctReport) -> list[str]:
    """Return the layers that use fewest and most experts, for the size with most calls."""
    most_called = max(report.sizes, key=lambda size: size.calls)
    known = [
        (size.mean, printable(layer.site, 12))
        for layer in report.layers
        for size in layer.sizes
        if most_called.tokens_min <= size.tokens_min and size.tokens_max <= most_called.tokens_max
    ]
    if len(known) < 2:
        return []
    low, high = min(known), max(known)
    if low[0] == high[0]:
        return []
    return [
        f"In forwards of {most_called.label} tokens, {low[1]} uses fewest ({number(low[0])} on average) and "
        f"{high[1]} most ({number(high[0])})."
    ]
