"""Workloads of `moe-trace run`: models, inputs and the steps on them."""
