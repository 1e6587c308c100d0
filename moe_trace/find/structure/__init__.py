"""Routers of any framework, told by what they are built of and by what they return, not by their class."""
