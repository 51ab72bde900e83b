"""``serve``: serves an index over HTTP."""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING

import anyio

from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Notice
from searchr1_async.search.http_server import DEFAULT_PORT, serve_search
from searchr1_async.search.search import Search
from searchr1_async.search.wire import ServingLimits
from searchr1_async.watch.dashboard import console_view

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add(commands: Parsers) -> None:
    serve = commands.add_parser("serve", help="serve an index over HTTP to other machines or processes")
    serve.add_argument("path", metavar="PATH", help="a compact index's folder, or anything else Search.open accepts")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind; 0.0.0.0 for other machines (%(default)s)")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to bind; 0 picks a free one (%(default)s)")
    serve.add_argument("--token-from", metavar="VARIABLE", help="environment variable with the required token")
    serve.add_argument("--embedder", help="embedder of the index (the index's own)")
    serve.add_argument("--collection", help="collection, if a Chroma folder or server has several")
    serve.add_argument("--results", type=int, default=3, help="default number of passages of /retrieve (%(default)s)")
    serve.add_argument(
        "--requests", type=int, default=ServingLimits().requests, help="maximum concurrent requests (%(default)s)"
    )
    serve.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
    token = None
    if options.token_from is not None and not (token := os.environ.get(options.token_from)):
        raise ConfigurationError(f"--token-from names {options.token_from}, which is not set")
    limits = ServingLimits(requests=options.requests)
    search = await Search.open(
        options.path, embedder=options.embedder, collection=options.collection, n_results=options.results
    )
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with (
            console_view() as progress,
            serve_search(search, host=options.host, port=options.port, token=token, limits=limits) as address,
        ):
            if token is None and options.host not in LOOPBACK:
                progress(Notice("no token required: anyone who can reach this machine can search", is_warning=True))
            progress(Notice(f"serving at {address} (GET /health, POST /retrieve); Ctrl-C stops it"))
            async for _ in signals:
                break
    return _stopped(options)


def _stopped(options: argparse.Namespace) -> str:
    return "Requests in flight were finished; the server has stopped."
