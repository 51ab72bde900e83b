"""Where a compact index takes its passages and vectors from."""

from searchr1_async.search.sources.base import Block, Metric, SourceFacts, VectorSource

__all__ = ["Block", "Metric", "SourceFacts", "VectorSource"]
