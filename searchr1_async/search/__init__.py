"""The search tool: passages for the queries of all running rollouts, in few requests."""

from searchr1_async.search.search import Search
from searchr1_async.search.stats import SearchStatistics

__all__ = ["Search", "SearchStatistics"]
