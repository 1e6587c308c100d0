"""Tests of TensorBoard's pages in a real headless Chromium."""
