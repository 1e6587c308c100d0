"""Tests that look at our files as a user does: TensorBoard's pages in a real headless Chromium."""
