"""Tiny random models of every Mixture-of-Experts family in transformers, with the truth about their routing.

Nothing here imports ``moe_trace``: the bench and its oracles must be able to contradict it.
"""
