"""``index``: embeds a corpus into an index."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from searchr1_async.errors import ConfigurationError
from searchr1_async.search.builders import build_index
from searchr1_async.search.embedders import DEFAULT_MODEL
from searchr1_async.search.passage_embedding import PACING
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.vector_store import WritableStore
from searchr1_async.watch.dashboard import console_view

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


def add(commands: Parsers) -> None:
    index = commands.add_parser("index", help="embed a corpus into a folder or a Chroma server")
    index.add_argument("corpus", metavar="CORPUS", help="a .jsonl, .jsonl.gz or .parquet file, or atlas")
    place = index.add_mutually_exclusive_group()
    place.add_argument("--path", type=Path, help="the index's folder (in the user's cache)")
    place.add_argument("--host", help="name or URL of a Chroma server, instead of a folder")
    index.add_argument("--port", type=int, default=8000, help="port of the server (%(default)s)")
    index.add_argument("--ssl", action="store_true", help="HTTPS")
    index.add_argument(
        "--collection", default="wiki_embeddings", help="collection on the server, created if missing (%(default)s)"
    )
    index.add_argument("--token-from", metavar="VARIABLE", help="environment variable with the server's token")
    index.add_argument(
        "--embedder", default=DEFAULT_MODEL, help="a sentence-transformers model, or gemini-embedding-001 (%(default)s)"
    )
    index.add_argument(
        "--longest-wait",
        type=float,
        default=PACING.longest_wait,
        metavar="SECONDS",
        help="longest Retry-After to accept from the embedder or server (%(default)g)",
    )
    index.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
    async with console_view() as progress:
        target = options.path if options.host is None else _server(options)
        pacing = replace(PACING, longest_wait=options.longest_wait)
        report = await build_index(options.corpus, target, embedder=options.embedder, pacing=pacing, emit=progress)
    return str(report)


def _stopped(options: argparse.Namespace) -> str:
    return "Embedded passages are kept; run the same command to resume."


def _server(options: argparse.Namespace) -> WritableStore:
    token = None
    if options.token_from is not None and not (token := os.environ.get(options.token_from)):
        raise ConfigurationError(f"--token-from names {options.token_from}, which is not set")
    return RemoteChroma(options.host, options.port, options.collection, ssl=options.ssl, token=token, create=True)
