"""Figures of routes: matrices of experts, curves, and a simulated cache."""
