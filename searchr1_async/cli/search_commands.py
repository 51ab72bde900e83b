"""Commands on indexes: ``index`` and ``serve``, and ``wiki18``, which downloads the prebuilt index of the 2018 Wikipedia and makes a
compact one of it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
from pathlib import Path

import anyio

from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.questions import load_questions
from searchr1_async.data.wikipedia_index import DIMENSION, PASSAGES, delete_index, fetch_index, index_place
from searchr1_async.errors import ConfigurationError, StoreError
from searchr1_async.events import Emit, Notice
from searchr1_async.search.builders import CompactReport, build_compact_index, build_index, needed_bytes
from searchr1_async.search.compact.assembly import SAMPLE_QUERIES
from searchr1_async.search.compact.files import MANIFEST_NAME, CompactManifest, CompactSettings
from searchr1_async.search.embedders import DEFAULT_MODEL as LOCAL_MODEL
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.gemini import DEFAULT_MODEL, make_embedder
from searchr1_async.search.http_server import DEFAULT_PORT, MAX_REQUESTS, serve_search
from searchr1_async.search.passage_embedding import PACING
from searchr1_async.search.search import Search
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.compat import FolderSource, collections_in
from searchr1_async.search.stores.vector_store import WritableStore, open_embedder
from searchr1_async.watch.views import ConsoleView

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SERVED = "Requests in flight were finished; the server has stopped."


def add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", metavar="CORPUS", help="a .jsonl, .jsonl.gz or .parquet file, or atlas")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--path", type=Path, help="the index's folder (in the user's cache)")
    place.add_argument("--host", help="name or URL of a Chroma server, instead of a folder")
    parser.add_argument("--port", type=int, default=8000, help="port of the server (%(default)s)")
    parser.add_argument("--ssl", action="store_true", help="HTTPS")
    parser.add_argument(
        "--collection", default="wiki_embeddings", help="collection on the server, created if missing (%(default)s)"
    )
    parser.add_argument("--token-from", metavar="VARIABLE", help="environment variable with the server's token")
    parser.add_argument(
        "--embedder", default=LOCAL_MODEL, help="a sentence-transformers model, or gemini-embedding-001 (%(default)s)"
    )
    parser.set_defaults(
        run=_index, stopped=lambda options: "Embedded passages are kept; run the same command to resume."
    )


async def _index(options: argparse.Namespace) -> str:
    async with ConsoleView() as progress:
        target = options.path if options.host is None else _server(options)
        report = await build_index(options.corpus, target, embedder=options.embedder, on_event=progress)
    return str(report)


def _server(options: argparse.Namespace) -> WritableStore:
    token = _token(options)
    return RemoteChroma(options.host, options.port, options.collection, ssl=options.ssl, token=token, create=True)


def _token(options: argparse.Namespace) -> str | None:
    token = None
    if options.token_from is not None and not (token := os.environ.get(options.token_from)):
        raise ConfigurationError(f"--token-from names {options.token_from}, which is not set")
    return token


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a compact index's folder, or anything else Search.open accepts")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; 0.0.0.0 for other machines (%(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to bind; 0 picks a free one (%(default)s)")
    parser.add_argument("--token-from", metavar="VARIABLE", help="environment variable with the required token")
    parser.add_argument("--embedder", help="embedder of the index (the index's own)")
    parser.add_argument("--collection", help="collection, if a Chroma folder or server has several")
    parser.add_argument("--results", type=int, default=3, help="default number of passages of /retrieve (%(default)s)")
    parser.add_argument("--requests", type=int, default=MAX_REQUESTS, help="maximum concurrent requests (%(default)s)")
    parser.set_defaults(run=_serve, stopped=lambda options: _SERVED)


async def _serve(options: argparse.Namespace) -> str:
    token = _token(options)
    search = await Search.open(
        options.path, embedder=options.embedder, collection=options.collection, n_results=options.results
    )
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with (
            ConsoleView() as progress,
            serve_search(
                search, host=options.host, port=options.port, token=token, max_requests=options.requests
            ) as address,
        ):
            if token is None and options.host not in LOOPBACK:
                progress(Notice("no token required: anyone who can reach this machine can search", is_warning=True))
            progress(Notice(f"serving at {address} (GET /health, POST /retrieve); Ctrl-C stops it"))
            async for _ in signals:
                break
    return _SERVED


def add_wiki18(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="target folder (in the user's cache)")
    parser.add_argument("--compact", action="store_true", help="build a compact index that needs under 8 GB of memory")
    parser.add_argument(
        "--embedder", default=DEFAULT_MODEL, help="with --compact: the embedder of the vectors (%(default)s)"
    )
    parser.add_argument("--recall", type=float, default=0.95, help="with --compact: target recall (%(default)s)")
    parser.add_argument(
        "--questions",
        help="with --compact: a suite or file of questions to measure recall with (default: passages of the index, which are "
        "easier to find)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the archive beside the index, and both beside a compact one"
    )
    parser.set_defaults(run=_wiki18, stopped=lambda options: "Downloaded data is kept; run the same command to resume.")


async def _wiki18(options: argparse.Namespace) -> str:
    async with ConsoleView() as progress:
        if options.compact:
            return await _compact(options, progress)
        found = await fetch_index(options.folder, keep_archive=options.keep, emit=progress)
    return (
        f"{found} holds the collection {', '.join(collections_in(found))}. Serve it with:\n"
        f"  chroma run --path {shlex.quote(str(found))}\n"
        "Chroma keeps every vector in memory: about 78 GB; its authors recommend 160 GB."
    )


async def _compact(options: argparse.Namespace, emit: Emit) -> str:
    """Downloads and compacts; resumes at the interrupted step, and once done only describes the index."""
    place = index_place(options.folder)
    index, settings = place / "compact", CompactSettings(recall=options.recall)
    questions = await in_thread(lambda: _questions(options.questions))  # validated before downloading
    if not (index / MANIFEST_NAME).exists():
        if questions:
            await _try_embedder(options.embedder, questions[0])
        spare = needed_bytes(PASSAGES, DIMENSION)
        source = FolderSource(await fetch_index(place, keep_archive=options.keep, spare=spare, emit=emit))
        named = {"embedder": options.embedder, "queries": questions}
        await build_compact_index(source, index, **named, settings=settings, on_event=emit)
    manifest = await in_thread(lambda: CompactManifest.load(index))
    if manifest.calibration.asked != options.recall:
        raise StoreError(
            f"{index} is complete but was built for a recall of {manifest.calibration.asked}: use it as it is, or delete it "
            "and run the command again"
        )
    if not options.keep:
        try:
            await in_thread(lambda: delete_index(place))
        except OSError as error:
            raise StoreError(
                f"the index {index} is complete, but {error.filename} cannot be deleted: {error}"
            ) from error
    return (
        f"{CompactReport(index, manifest)}\n"
        f"Serve it: python -m searchr1_async serve {shlex.quote(str(index))}\n"
        f'Or search it here: await sr.Search.open("{index}")'
    )


def _questions(suite: str | None) -> list[str] | None:
    if suite is None:
        return None
    return [question.question for question in load_questions(suite, limit=SAMPLE_QUERIES, seed=1)]


async def _try_embedder(name: str, question: str) -> None:
    """Embeds one question before hours of download, to detect a missing key."""
    embedder = make_embedder(name)
    try:
        await open_embedder(embedder, PACING)
        with contextlib.suppress(PassingFault):  # it is reachable; the build retries for longer
            await embedder.embed_queries([question])
    finally:
        with anyio.CancelScope(shield=True):
            await embedder.aclose()
