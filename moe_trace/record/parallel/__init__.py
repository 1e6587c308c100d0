"""Process groups, device meshes and what a rank dispatches."""
