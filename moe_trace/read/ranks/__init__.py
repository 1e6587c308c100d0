"""Several ranks together: collectives, clocks, loads, and one merged trace."""
