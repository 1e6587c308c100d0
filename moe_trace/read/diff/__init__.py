"""What changed between two recordings: the set-up, then the routing, then the time."""

from moe_trace.read.diff.comparison import Change, Comparison, compare

__all__ = ["Change", "Comparison", "compare"]
