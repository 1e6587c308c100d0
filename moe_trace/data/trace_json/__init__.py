"""Streaming access to a trace's JSON: its top-level keys and its events."""
