"""Release version; must match `setup.cfg`."""

__version__ = "0.2.0"
