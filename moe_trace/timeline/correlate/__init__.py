"""Placement of recorded calls in a trace: inside their ranges, or at the launch of a graph."""
