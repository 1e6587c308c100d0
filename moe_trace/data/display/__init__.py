"""What renderers share: colours, and who draws what in a notebook."""
