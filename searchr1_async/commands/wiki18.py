"""``wiki18``: fetches the prebuilt index of Wikipedia of 2018."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from searchr1_async.data.wiki18 import ARCHIVE, REPOSITORY, PrebuiltIndex, fetch_index
from searchr1_async.watch.progress import ConsoleProgress

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


def add(commands: Parsers) -> None:
    wiki18 = commands.add_parser("wiki18", help="fetch the prebuilt index of Wikipedia of 2018 (21 million passages)")
    wiki18.add_argument("--folder", type=Path, help="where it goes (in the user's cache)")
    wiki18.add_argument("--keep-archive", action="store_true", help="leave the archive beside the unpacked index")
    wiki18.add_argument("--repository", default=REPOSITORY, help="data set on the Hugging Face hub (%(default)s)")
    wiki18.add_argument("--archive", default=ARCHIVE, help="file in it, a .tar.xz of a Chroma folder (%(default)s)")
    wiki18.add_argument("--revision", help="branch, tag or commit (main)")
    wiki18.add_argument("--endpoint", help="another hub's address, a mirror say ($HF_ENDPOINT)")
    wiki18.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
    with ConsoleProgress() as progress:
        found = await fetch_index(
            options.folder,
            repository=options.repository,
            filename=options.archive,
            revision=options.revision,
            keep_archive=options.keep_archive,
            endpoint=options.endpoint,
            emit=progress,
        )
    return describe(found)


def _stopped(options: argparse.Namespace) -> str:
    return "What has come is kept; the same command goes on."


def describe(found: PrebuiltIndex) -> str:
    """What is there now, how to serve it, and what that takes."""
    lines = [f"{'Fetched' if found.is_new else 'Fetched before'}: {found.path} ({found.repository}, {found.revision})"]
    lines += [
        f"  collection {collection.name}: {collection.passages:,} passages, {collection.dimension or '?'} dimensions"
        for collection in found.collections
    ]
    lines += ["Serve it with:", f"  chroma run --path {shlex.quote(str(found.path))}"]
    if found.memory >= 1e9:
        advice = "; its makers advise a machine with 160 GB" if found.repository == REPOSITORY else ""
        lines.append(f"Chroma keeps every vector in memory: about {found.memory / 1e9:,.0f} GB{advice}.")
    return "\n".join(lines)
