"""Trains many algorithms, environments and seeds: `python -m benchmarks.launch`, explained in docs/launch.md."""
