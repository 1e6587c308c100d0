"""Reports on the experts that forwards use."""
