"""Findings: notable properties of a trace, with advice."""
