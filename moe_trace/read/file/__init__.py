"""Reading of trace files: opening, separation of processes and ranks, decoding of recording and events."""
