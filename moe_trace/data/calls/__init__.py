"""The table of router calls, and what it is made of."""
