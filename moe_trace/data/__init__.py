"""Records, their encoding, summaries, errors and files, shared by recording and reading. No torch."""
