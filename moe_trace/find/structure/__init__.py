"""Routers of any framework, recognised by their parts and by what they return, not by their class."""
