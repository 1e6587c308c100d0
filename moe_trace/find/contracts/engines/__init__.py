"""Contracts of inference engines, which run the modules of models in their own way."""
