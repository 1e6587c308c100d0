"""Routes as text, JSON, and pages of tokens."""
