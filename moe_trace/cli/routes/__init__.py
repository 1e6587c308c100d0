"""`moe-trace routes`: commands on files of routes."""
