"""A trace reduced to what reports ask of it: in memory, in a small file beside it, by several processes."""
