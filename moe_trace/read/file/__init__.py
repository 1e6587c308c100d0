"""Reading trace files: JSON, events, kernels and their launches."""
