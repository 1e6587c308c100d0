"""Renderers of routes as text, JSON, and pages of tokens."""
