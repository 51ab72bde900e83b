"""``wiki18``: downloads the prebuilt index of the 2018 Wikipedia and optionally compacts it."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from searchr1_async.errors import StoreError
from searchr1_async.events import Emit, Notice
from searchr1_async.search.builders import build_compact_index, differing, needed_bytes
from searchr1_async.search.compact.assembly import SAMPLE_QUERIES
from searchr1_async.search.compact.layout import MANIFEST_NAME, CompactManifest, CompactSettings
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.gemini import DEFAULT_MODEL, make_embedder
from searchr1_async.search.passage_embedding import PACING
from searchr1_async.search.stores.chroma_sources import ChromaFolder
from searchr1_async.search.stores.vector_store import open_embedder
from searchr1_async.watch.dashboard import console_view

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


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


def add(commands: Parsers) -> None:
    wiki18 = commands.add_parser(
        "wiki18", help="download the prebuilt index of the 2018 Wikipedia (21 million passages)"
    )
    wiki18.add_argument("--folder", type=Path, help="target folder (in the user's cache)")
    wiki18.add_argument("--keep-archive", action="store_true", help="keep the archive beside the unpacked index")
    wiki18.add_argument("--repository", default=REPOSITORY, help="data set on the Hugging Face hub (%(default)s)")
    wiki18.add_argument("--archive", default=ARCHIVE, help="its .tar.xz of a Chroma folder (%(default)s)")
    wiki18.add_argument("--revision", help="branch, tag or commit (main)")
    wiki18.add_argument("--endpoint", help="URL of another hub, such as a mirror ($HF_ENDPOINT)")
    wiki18.add_argument(
        "--longest-wait",
        type=float,
        default=LONGEST_WAIT,
        metavar="SECONDS",
        help="longest Retry-After to accept from the hub (%(default)g)",
    )
    wiki18.add_argument("--compact", action="store_true", help="build a compact index that needs under 8 GB of memory")
    wiki18.add_argument(
        "--embedder", default=DEFAULT_MODEL, help="with --compact: the embedder of the vectors (%(default)s)"
    )
    wiki18.add_argument(
        "--vectors",
        choices=("float16", "int8"),
        default="float16",
        help="with --compact: how vectors are stored (%(default)s)",
    )
    wiki18.add_argument("--recall", type=float, default=0.95, help="with --compact: target recall (%(default)s)")
    wiki18.add_argument(
        "--questions",
        help="with --compact: a suite or file of questions to measure recall with (default: passages of the index, which are "
        "easier to find)",
    )
    wiki18.add_argument(
        "--keep", action="store_true", help="with --compact: keep the downloaded files beside the index"
    )
    wiki18.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
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


def _stopped(options: argparse.Namespace) -> str:
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
