"""What is private in other packages."""
