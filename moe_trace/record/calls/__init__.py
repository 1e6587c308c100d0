"""Recorded router calls: referenced, reduced in batches, copied to the host late, made into samples."""
