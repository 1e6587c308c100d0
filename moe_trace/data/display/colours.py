"""Colours of load pictures: those of the figures, and of the images that TensorBoard shows."""

# Blue below, orange above the centre: told apart with any kind of colour vision. A page may put other colours
# in place of these five for its dark theme.
DIVERGING = ("#2166AC", "#92C5DE", "#F5F5F5", "#FDB863", "#B35806")
