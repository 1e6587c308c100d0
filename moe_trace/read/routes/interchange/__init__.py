"""Import and export of routes: engines' arrays, Megatron's JSONL, Arrow, safetensors."""
