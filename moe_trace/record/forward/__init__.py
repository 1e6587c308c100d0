"""Context of a forward of the model: its step, its inputs, and the routers that it did not reach."""
