"""A process that makes a compact index and says what it does, a line an event: the one that is killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import anyio

from searchr1_async.events import Event, PhaseAdvanced, PhaseStarted
from searchr1_async.search.builders import build_compact_index
from searchr1_async.search.compact import assembly as build
from searchr1_async.search.compact.files import VectorFile
from searchr1_async.search.compact.layout import CompactSettings
from tests.search.compact.arrays import Arrays, clustered

ROWS, DIMENSION = 60_000, 64
LISTS = 1_100
"""So many that a vector is compared with those of some groups."""
SYNCED = 4_000
MOMENT = 0.01
"""Seconds that each event takes, so that even the shortest phase can be met."""


class TellingArrays(Arrays):
    """Says which rows it was asked for, and which are kept."""

    async def kept(self, rows: int) -> None:
        say("kept", rows)
        await super().kept(rows)

    def blocks(self, start: int) -> Any:
        say("from", start)
        return super().blocks(start)


def say(*words: object) -> None:
    # At once and whole, as the process may be gone a moment later.
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def tell(event: Event) -> None:
    match event:
        case PhaseStarted():
            say("begin", event.phase)
        case PhaseAdvanced():
            say(event.phase, event.done)
        case _:
            return
    time.sleep(MOMENT)


def main(folder: Path, vectors: Any, metric: Any) -> None:
    # Smaller than they are, so that every phase has several marks to go on from.
    for name, value in (("_SYNC_ROWS", SYNCED), ("_CODE_ROWS", 2_500), ("_CODE_BLOCKS_KEPT", 2)):
        assert hasattr(build, name)
        setattr(build, name, value)
    VectorFile.slabs.__defaults__ = (0, 10_000)
    source = TellingArrays(clustered(ROWS, DIMENSION), metric, block=1_000)
    settings = CompactSettings(vectors=vectors, lists=LISTS)

    async def make() -> None:
        report = await build_compact_index(source, folder, settings=settings, emit=tell)
        say("whole", report.manifest.passages)

    anyio.run(make)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
