"""Serves a search over HTTP, for other processes and machines, and for clients of Search-R1's retrieval server."""

from searchr1_async.search.serving.limits import ServingLimits
from searchr1_async.search.serving.server import DEFAULT_PORT, serve_search

__all__ = ["DEFAULT_PORT", "ServingLimits", "serve_search"]
