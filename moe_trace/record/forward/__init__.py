"""What is known of a forward of the model: its context, its inputs, and the routers that it missed."""
