"""Analysis of recorded routes: `study`, cache simulation, checks and comparisons. Does not import torch."""
