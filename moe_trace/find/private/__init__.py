"""Access to private APIs of other packages."""
