"""Discovery of a model's routers and of the contracts that read their outputs."""
