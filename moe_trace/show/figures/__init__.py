"""Figures of the report and the TensorBoard tab, one module per group."""
