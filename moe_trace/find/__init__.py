"""Finding the routers of a model, and what each of them returns."""
