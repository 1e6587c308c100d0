"""Reduction of router outputs to statistics on the device."""
