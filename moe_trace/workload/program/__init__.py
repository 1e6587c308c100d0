"""A program of the user's: run as Python runs it, and watched."""
