"""Expert placement: plans that are chosen and evaluated on recorded counts alone. Does not import torch.

Shape suffixes: S observations (steps or texts), B blocks of observations that a plan is chosen on, F folds of
a split, L layers, E experts, P expert slots of all ranks, I items to place, R ranks, N nodes, K bins.
"""
