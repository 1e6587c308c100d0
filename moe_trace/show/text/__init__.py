"""A report as text for terminals of 80 columns."""

from moe_trace.show.text.report import render_text

__all__ = ["render_text"]
