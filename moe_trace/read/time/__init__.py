"""Where the time goes: blocks, phases, speed, the price of imbalance."""
