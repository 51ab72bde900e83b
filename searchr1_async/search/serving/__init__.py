"""A search over HTTP: for several machines or processes, and for other programs of Search-R1's kind."""

from searchr1_async.search.serving.limits import ServingLimits
from searchr1_async.search.serving.server import DEFAULT_PORT, serve_search

__all__ = ["DEFAULT_PORT", "ServingLimits", "serve_search"]
