"""What forwards read of the experts."""
