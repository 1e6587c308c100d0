"""Texts (sequences) of recorded routes, and the text of their tokens."""
