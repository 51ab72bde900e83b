"""The scripted model of the engine's costs: that of the throughput benchmark."""

from benchmarks.throughput.model import reply

__all__ = ["reply"]
