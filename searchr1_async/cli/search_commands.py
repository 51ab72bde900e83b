"""Commands on indexes: ``index`` and ``serve``, and ``wiki18``, which downloads the prebuilt index of the 2018 Wikipedia and makes a
compact one of it."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import anyio

from searchr1_async.boundary.paths import absolute_path, cache_folder, folder_bytes
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.hub import LONGEST_WAIT, free_bytes
from searchr1_async.data.questions import load_questions
from searchr1_async.data.wikipedia_index import (
    ARCHIVE,
    REPOSITORY,
    FetchSizes,
    PrebuiltIndex,
    delete_index,
    fetch_index,
    fetch_sizes,
    gigabytes,
)
from searchr1_async.errors import ConfigurationError, StoreError
from searchr1_async.events import Emit, Notice
from searchr1_async.search.builders import build_compact_index, build_index, differing, needed_bytes
from searchr1_async.search.compact.assembly import SAMPLE_QUERIES
from searchr1_async.search.compact.files import MANIFEST_NAME, CompactManifest, CompactSettings
from searchr1_async.search.embedders import DEFAULT_MODEL as LOCAL_MODEL
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.gemini import DEFAULT_MODEL, make_embedder
from searchr1_async.search.http_server import DEFAULT_PORT, serve_search
from searchr1_async.search.passage_embedding import PACING
from searchr1_async.search.search import Search
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.chroma_sources import ChromaFolder
from searchr1_async.search.stores.vector_store import WritableStore, open_embedder
from searchr1_async.search.wire import ServingLimits
from searchr1_async.watch.dashboard import console_view

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PASSAGES, DIMENSION = 21_015_324, 768
"""Size of the Wikipedia index."""
COMPACT_SHARE = 0.5
"""Upper bound of a float16 compact index, as a fraction of its Chroma folder's bytes (for other indexes)."""
DOWNLOAD_RATE = 20e6
"""Assumed bytes per second; shown with the estimate."""
UNPACK_RATE = 25e6
"""Unpacked bytes per second of xz on one core."""
COMPACT_RATE = 10_000.0
"""Passages of 768 dimensions per second from Chroma folder to index, on 2 cores."""
_SPARE = 1 << 30


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
    parser.add_argument(
        "--longest-wait",
        type=float,
        default=PACING.longest_wait,
        metavar="SECONDS",
        help="longest Retry-After to accept from the embedder or server (%(default)g)",
    )
    parser.set_defaults(run=_index, stopped=_index_stopped)


async def _index(options: argparse.Namespace) -> str:
    async with console_view() as progress:
        target = options.path if options.host is None else _server(options)
        pacing = replace(PACING, longest_wait=options.longest_wait)
        report = await build_index(options.corpus, target, embedder=options.embedder, pacing=pacing, emit=progress)
    return str(report)


def _index_stopped(options: argparse.Namespace) -> str:
    return "Embedded passages are kept; run the same command to resume."


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
    parser.add_argument(
        "--requests", type=int, default=ServingLimits().requests, help="maximum concurrent requests (%(default)s)"
    )
    parser.set_defaults(run=_serve, stopped=_serve_stopped)


async def _serve(options: argparse.Namespace) -> str:
    token = _token(options)
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
    return _serve_stopped(options)


def _serve_stopped(options: argparse.Namespace) -> str:
    return "Requests in flight were finished; the server has stopped."


def add_wiki18(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="target folder (in the user's cache)")
    parser.add_argument("--keep-archive", action="store_true", help="keep the archive beside the unpacked index")
    parser.add_argument("--repository", default=REPOSITORY, help="data set on the Hugging Face hub (%(default)s)")
    parser.add_argument("--archive", default=ARCHIVE, help="its .tar.xz of a Chroma folder (%(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit (main)")
    parser.add_argument("--endpoint", help="URL of another hub, such as a mirror ($HF_ENDPOINT)")
    parser.add_argument(
        "--longest-wait",
        type=float,
        default=LONGEST_WAIT,
        metavar="SECONDS",
        help="longest Retry-After to accept from the hub (%(default)g)",
    )
    parser.add_argument("--compact", action="store_true", help="build a compact index that needs under 8 GB of memory")
    parser.add_argument(
        "--embedder", default=DEFAULT_MODEL, help="with --compact: the embedder of the vectors (%(default)s)"
    )
    parser.add_argument(
        "--vectors",
        choices=("float16", "int8"),
        default="float16",
        help="with --compact: how vectors are stored (%(default)s)",
    )
    parser.add_argument("--recall", type=float, default=0.95, help="with --compact: target recall (%(default)s)")
    parser.add_argument(
        "--questions",
        help="with --compact: a suite or file of questions to measure recall with (default: passages of the index, which are "
        "easier to find)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="with --compact: keep the downloaded files beside the index"
    )
    parser.set_defaults(run=_wiki18, stopped=_wiki18_stopped)


async def _wiki18(options: argparse.Namespace) -> str:
    async with console_view() as progress:
        if options.compact:
            return await _compact(options, progress)
        return describe(await _fetched(options, progress))


async def _fetched(options: argparse.Namespace, emit: Emit) -> PrebuiltIndex:
    return await fetch_index(
        options.folder,
        repository=options.repository,
        filename=options.archive,
        revision=options.revision,
        keep_archive=options.keep_archive,
        endpoint=options.endpoint,
        longest_wait=options.longest_wait,
        emit=emit,
    )


async def _compact(options: argparse.Namespace, emit: Emit) -> str:
    """Downloads and compacts; resumes at the interrupted step, and once done only describes the index."""
    place = absolute_path(options.folder or cache_folder() / "wiki18", "--folder")
    index = place / "compact"
    settings = CompactSettings(vectors=options.vectors, recall=options.recall)
    questions = await in_thread(lambda: _questions(options.questions))  # validated before downloading
    if not (index / MANIFEST_NAME).exists():
        if questions:
            await _try_embedder(options.embedder, questions[0])
        sizes = await fetch_sizes(
            place,
            repository=options.repository,
            filename=options.archive,
            revision=options.revision,
            endpoint=options.endpoint,
        )
        is_kept = options.keep or options.keep_archive
        there = folder_bytes(index)
        plan = plan_of(sizes, max(0, _index_bytes(options.repository, sizes, settings) - there), is_kept=is_kept)
        free = free_bytes(place)
        emit(Notice(f"{plan} in {place}, where {gigabytes(free)} are free"))
        if plan.peak > free:
            raise StoreError(
                f"{plan} in {place}, where {gigabytes(free)} are free: free up {gigabytes(plan.peak - free)}, or choose a folder "
                "on another disk"
            )
        found = await _fetched(options, emit)
        source = ChromaFolder(found.path, embedder=options.embedder)
        await build_compact_index(
            source,
            index,
            queries=questions,
            settings=settings,
            emit=emit,
        )
    manifest = await in_thread(lambda: CompactManifest.load(index))
    if differs := differing(manifest, settings, has_queries=questions is not None):
        raise StoreError(
            f"{index} is complete but was built with {differs}: use it as it is, or delete it and run the command again"
        )
    if not options.keep:
        try:
            await in_thread(lambda: delete_index(place, options.archive, keep_archive=options.keep_archive))
        except OSError as error:
            raise StoreError(
                f"the index {index} is complete, but {error.filename} cannot be deleted: {error}"
            ) from error
    return describe_compact(index, manifest)


def _questions(suite: str | None) -> list[str] | None:
    if suite is None:
        return None
    return [question.question for question in load_questions(suite, limit=SAMPLE_QUERIES, seed=1)]


async def _try_embedder(name: str, question: str) -> None:
    """Embeds one question before hours of download, to detect a missing key."""
    embedder = make_embedder(name)
    try:
        await open_embedder(embedder, PACING)
        try:
            await embedder.embed_queries([question])
        except PassingFault:  # it is reachable; the build retries for longer
            return
    finally:
        with anyio.CancelScope(shield=True):
            await embedder.aclose()


@dataclass(frozen=True, slots=True)
class Plan:
    to_fetch: int
    index: int
    peak: int
    """Peak additional bytes on disk."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{gigabytes(self.to_fetch)} to download, a final index of about {gigabytes(self.index)}, and about "
            f"{self.seconds / 3600:,.1f} hours (at {DOWNLOAD_RATE / 1e6:,.0f} MB/s of download): at peak it needs "
            f"{gigabytes(self.peak)}"
        )


def plan_of(sizes: FetchSizes, index: int, *, is_kept: bool) -> Plan:
    """Estimates downloading, unpacking and building ``index`` bytes; ``is_kept``: the archive stays during the build."""
    archive_freed = 0 if is_kept or not sizes.unpacked else sizes.there
    building = sizes.unpacked + index + (sizes.to_fetch if is_kept else 0) - archive_freed
    passages = index / needed_bytes(1, DIMENSION, CompactSettings())
    seconds = sizes.to_fetch / DOWNLOAD_RATE + sizes.unpacked / UNPACK_RATE + passages / COMPACT_RATE
    return Plan(sizes.to_fetch, index, max(sizes.to_fetch + sizes.unpacked, building) + _SPARE, seconds)


def _index_bytes(repository: str, sizes: FetchSizes, settings: CompactSettings) -> int:
    if repository == REPOSITORY:
        return needed_bytes(PASSAGES, DIMENSION, settings)
    return int(sizes.unpacked * COMPACT_SHARE)


def _wiki18_stopped(options: argparse.Namespace) -> str:
    return "Downloaded data is kept; run the same command to resume."


def describe(found: PrebuiltIndex) -> str:
    lines = [
        f"{'Downloaded' if found.is_new else 'Already downloaded'}: {found.path} ({found.repository}, {found.revision})"
    ]
    lines += [
        f"  collection {collection.name}: {collection.passages:,} passages, {collection.dimension or '?'} dimensions"
        for collection in found.collections
    ]
    lines += ["Serve it with:", f"  chroma run --path {shlex.quote(str(found.path))}"]
    if found.memory >= 1e9:
        advice = "; its authors recommend 160 GB" if found.repository == REPOSITORY else ""
        lines.append(f"Chroma keeps every vector in memory: about {found.memory / 1e9:,.0f} GB{advice}.")
    return "\n".join(lines)


def describe_compact(index: Path, manifest: CompactManifest) -> str:
    size = sum(record.bytes for record in manifest.files.values())
    chosen = manifest.calibration
    return "\n".join(
        [
            f"{index}: {manifest.passages:,} passages, {manifest.dimension} dimensions, {gigabytes(size)}",
            f"  finds {chosen.recall:.1%} of the {chosen.recall_at} nearest passages ({chosen.queries} {chosen.origin})",
            f"Serve it: python -m searchr1_async serve {shlex.quote(str(index))}",
            f'Or search it here: await sr.Search.open("{index}")',
        ]
    )
