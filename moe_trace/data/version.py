"""The release; `setup.cfg` says the same."""

__version__ = "0.2.0"
