"""Compare two recordings: their set-up, their routing, then their time."""

from moe_trace.read.diff.comparison import Change, Comparison, compare

__all__ = ["Change", "Comparison", "compare"]
