"""Record routing: from forward hooks to samples. Only this half of the package needs torch."""
