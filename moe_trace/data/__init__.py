"""The vocabulary of both halves: records, their encoding, summaries, errors and files. No torch."""
