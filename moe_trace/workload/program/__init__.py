"""Run and watch a program of the user."""
