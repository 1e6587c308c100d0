"""Analysis of trace files: reading, phases, speed, findings. Nothing in this package imports torch."""
