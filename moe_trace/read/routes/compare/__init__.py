"""Two routings of the same tokens: what they share by layer and position, and where they begin to differ."""
