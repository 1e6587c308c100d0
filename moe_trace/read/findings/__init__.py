"""What stands out in a trace, and what to do about it."""
