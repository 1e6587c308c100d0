"""Where each recorded call stands in a trace: inside its range, or at the launch of a graph."""
