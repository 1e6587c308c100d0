"""Recording: from forward hooks to samples. The only half that needs torch."""
