"""Integrations with training loops and serving engines of other libraries."""
