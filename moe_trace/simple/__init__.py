"""The start/stop interface: MoEProfiler, SimpleBenchmark, CSV."""
