"""Understand a trace's JSON without holding it: its top-level keys, and its events."""
