"""Compare two routings of the same tokens: overlap by layer and position, and where they begin to differ."""
