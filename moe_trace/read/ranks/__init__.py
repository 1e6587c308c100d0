"""Analysis of several ranks together: collectives, clock alignment, loads, and merged traces."""
