"""Contracts of inference engines, which call the modules of models in their own way."""
