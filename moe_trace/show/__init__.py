"""Renderers of a summary as text, JSON, CSV or HTML. They compute no metrics of their own."""
