"""From router outputs to figures, on the device."""
