"""Forward hooks on routers, experts, blocks and the model."""
