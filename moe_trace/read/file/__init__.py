"""Trace files: opened, told apart by process and rank, taken apart into recording and events."""
