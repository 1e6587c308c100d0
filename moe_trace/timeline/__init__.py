"""Placing samples on a trace's timeline, and splicing counters, lanes and the recording into its file.

Nothing in here imports torch, and nothing parses the trace into objects.
"""
