"""Which rank should hold which expert: plans chosen and judged on recorded counts alone. Imports no torch.

Suffixes: S observations (steps or texts), B blocks of observations that a plan is chosen on, F folds of a
split, L layers, E experts, P expert slots of all ranks, I items to place, R ranks, N nodes, K bins.
"""
