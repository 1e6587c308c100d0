"""The commands of `moe-trace routes`."""
