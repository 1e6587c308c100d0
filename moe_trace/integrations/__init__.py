"""Integrations with other libraries' training loops and serving engines."""
