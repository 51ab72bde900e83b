"""Search and checkpoint options shared by commands."""

from __future__ import annotations

import argparse
from typing import Any

from searchr1_async.errors import ConfigurationError
from searchr1_async.runs.weights import Step, parse_step
from searchr1_async.search.places import SearchOptions
from searchr1_async.search.search import Search

_NAMES = ("corpus", "chroma", "collection", "embedder", "results", "passage_words")


def add_search(group: Any) -> None:
    """Adds search options to a parser or group, without defaults: recorded settings apply if none is given."""
    group.add_argument("--corpus", help="atlas, or a file of passages (atlas)")
    group.add_argument("--chroma", metavar="HOST:PORT", help="a Chroma server instead")
    group.add_argument("--collection", help="collection on that server (wiki_embeddings)")
    group.add_argument(
        "--embedder", help="embedder of the index (all-MiniLM-L6-v2; with --chroma gemini-embedding-001)"
    )
    group.add_argument("--results", type=int, help="passages per query (3)")
    group.add_argument("--passage-words", type=int, help="maximum words per passage")


def named_search(options: argparse.Namespace) -> Search | None:
    """The search from the options, or None if no option is set. Errors as :meth:`Search.local` and :meth:`Search.chroma`."""
    return search_of(options) if any(getattr(options, name) is not None for name in _NAMES) else None


def search_of(options: argparse.Namespace) -> Search:
    """The search from the options and defaults; errors as :func:`named_search`."""
    settings = SearchOptions()
    if options.results is not None:
        settings["n_results"] = options.results
    if options.passage_words is not None:
        settings["max_passage_words"] = options.passage_words
    if options.chroma is None:
        embedder = {} if options.embedder is None else {"embedder": options.embedder}
        return Search.local("atlas" if options.corpus is None else options.corpus, **embedder, **settings)
    host, _, port = options.chroma.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigurationError(f"--chroma {options.chroma!r}: expected HOST:PORT, such as localhost:8000")
    embedder, collection = options.embedder or "gemini-embedding-001", options.collection or "wiki_embeddings"
    return Search.chroma(host, int(port), collection, embedder=embedder, **settings)


def step_argument(text: str) -> Step:
    if (step := parse_step(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected last, best, or a number of steps")
    return step
