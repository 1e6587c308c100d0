"""Recording inside compiled code and CUDA graphs."""
