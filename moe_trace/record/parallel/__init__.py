"""Process groups, device meshes and the tokens that a rank dispatches."""
