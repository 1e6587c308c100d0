"""Routers of any framework, recognized by their modules and outputs rather than by class."""
