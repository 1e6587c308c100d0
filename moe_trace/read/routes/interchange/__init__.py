"""Routes of other tools, read and written: engines' arrays, Megatron's JSONL, Arrow, safetensors."""
