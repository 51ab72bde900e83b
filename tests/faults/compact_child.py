"""A process that makes a compact index and says what it does, a line an event: the one that is killed.

It does not get further than the phase it is to be killed in: it waits there for the kill, however slow the machine is.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from searchr1_async.events import Event, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.search.builders import build_compact_index
from searchr1_async.search.compact import assembly as build
from searchr1_async.search.compact.files import CompactSettings, VectorFile
from tests.search.compact.arrays import Arrays, clustered

PHASES = ("rows", "lists", "codes", "exact", "calibrate", "checksums")
"""In their order."""
ROWS, DIMENSION = 60_000, 64
LISTS = 1_100
"""So many that a vector is compared with those of some groups."""
SYNCED = 0.05
"""Seconds."""
MOMENT = 0.01
"""Seconds that each event takes, so that even the shortest phase can be met."""
LONG = 300.0
"""Seconds in which the kill has come for sure."""


class TellingArrays(Arrays):
    """Says which rows it was asked for."""

    def blocks(self, start: int) -> Any:
        say("from", start)
        return super().blocks(start)


def say(*words: object) -> None:
    # At once and whole, as the process may be gone a moment later.
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def tell(event: Event, phase: str, at_end: bool) -> None:
    match event:
        case PhaseStarted():
            say("begin", event.phase)
            time.sleep(LONG if phase and PHASES.index(event.phase) > PHASES.index(phase) else MOMENT)
        case PhaseAdvanced():
            say(event.phase, event.done)
            time.sleep(MOMENT)
        case PhaseEnded() if at_end and event.phase == phase:
            say("end", event.phase)
            time.sleep(LONG)
        case _:
            return


def main(folder: Path, metric: Any, phase: str, at_end: bool) -> None:
    """Makes the index in a folder, at most up to the phase after ``phase``; ``at_end``, not even beyond it. "" for all phases."""
    # Smaller than they are, so that every phase has several marks to go on from.
    for name, value in (("_SYNC_SECONDS", SYNCED), ("_CODE_ROWS", 2_500)):
        assert hasattr(build, name)
        setattr(build, name, value)
    VectorFile.slabs.__defaults__ = (0, 10_000)
    source = TellingArrays(clustered(ROWS, DIMENSION), metric, block=1_000)
    settings = CompactSettings(lists=LISTS)
    on_event = partial(tell, phase=phase, at_end=at_end)

    async def make() -> None:
        report = await build_compact_index(source, folder, settings=settings, on_event=on_event)
        say("whole", report.manifest.passages)

    anyio.run(make)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "at end")
