"""A run's events as lines of a file, always: what happened when, for plots and for whoever asks later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.events import Event, PhaseAdvanced, PhaseEnded, RolloutSampled
from searchr1_async.files import write_all
from searchr1_async.watch.trackers.base import QueuedTracker, Timed
from searchr1_async.watch.trackers.lines import decoded, encoded

EVENTS_FILE = "events.jsonl"
"""Its name in a run's folder."""

SECONDS_BETWEEN_SAMPLES = 0.5
"""``RolloutSampled`` and ``PhaseAdvanced`` are kept twice a second at most: 60 MB a day of samples otherwise."""


class JsonlTracker(QueuedTracker):
    """Appends each event to a file as one line: ``{"time": <unix seconds>, "event": "StepFinished", "step": 3, …}``.

    Episodes and groups are told in a few figures (their bodies are in the run's Parquet files). Lines reach the file
    within a second. A process that is killed leaves at most its last line torn; the next one mends it.

    Args:
        path: the file; its folder is made.
        clock: unix seconds.
    """

    name = "the event log"

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(close_within=5.0, clock=clock)
        self._path = absolute_path(path)
        self._file: BinaryIO | None = None
        self._sampled_at = float("-inf")
        self._advanced_at: dict[str, float] = {}
        self._skipped: dict[str, Timed] = {}

    def wants(self, event: Event, now: float) -> bool:
        if isinstance(event, RolloutSampled):
            if now - self._sampled_at < SECONDS_BETWEEN_SAMPLES:
                return False
            self._sampled_at = now
        elif isinstance(event, PhaseAdvanced):
            if now - self._advanced_at.get(event.phase, float("-inf")) < SECONDS_BETWEEN_SAMPLES:
                self._skipped[event.phase] = (now, event)
                return False
            self._advanced_at[event.phase] = now
            self._skipped.pop(event.phase, None)
        elif isinstance(event, PhaseEnded) and (skipped := self._skipped.pop(event.phase, None)):
            self._waiting.put(skipped)  # how far the phase came at last
        return True

    def open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        mend(self._path)
        self._file = self._path.open("ab", buffering=0)

    def write(self, batch: Sequence[Timed]) -> None:
        assert self._file is not None
        write_all(self._file, b"".join(encoded(moment, event) for moment, event in batch))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def mend(path: Path) -> None:
    """Ends the last line of a file: completes it if only its end is missing, else cuts it off."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        torn, start = b"", end
        while start and b"\n" not in torn:
            size = min(1 << 16, start)
            start -= size
            file.seek(start)
            torn = file.read(size) + torn
        torn = torn[torn.rfind(b"\n") + 1 :]
        if not torn:
            return
        if decoded(torn) is None:
            file.truncate(end - len(torn))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
