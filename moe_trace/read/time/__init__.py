"""Time analysis: blocks, phases, speed, the cost of imbalance."""
