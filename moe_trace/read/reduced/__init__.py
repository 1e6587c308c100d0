"""Reduction of traces to what reports require, in memory or in a small file, by several processes."""
