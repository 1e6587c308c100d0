"""The table of router calls and its columns."""
