"""The command `moe-trace run`, for a model or a program."""
