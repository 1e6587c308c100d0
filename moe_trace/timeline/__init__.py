"""Placement of samples on a trace's timeline, and insertion of counters, lanes and the recording in its file.

Nothing here imports torch or parses the trace into objects.
"""
