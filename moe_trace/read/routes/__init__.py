"""What recorded routes say: the analyses of `study`, a simulated cache, checks and comparisons; no torch."""
