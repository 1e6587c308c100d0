"""Tests with several ranks: their processes, their parallel modes, and checks of what they record."""
