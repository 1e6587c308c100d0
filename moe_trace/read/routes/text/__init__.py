"""The texts that routes belong to, and the text of their tokens."""
