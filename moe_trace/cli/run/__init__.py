"""`moe-trace run`, of a model and of a program."""
