"""Running and watching a program of the user."""
