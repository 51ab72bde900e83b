"""Measurements, each in a folder of its own: `python -m benchmarks` lists them."""
