"""The event log: a run's events as JSON lines, always written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from searchr1_async.boundary.paths import absolute_path, write_all
from searchr1_async.events import Event, PhaseAdvanced, PhaseEnded, RolloutSampled
from searchr1_async.watch.trackers.base import QueuedTracker, Timed
from searchr1_async.watch.trackers.lines import decoded, encoded

EVENTS_FILE = "events.jsonl"
"""File name in a run's folder."""

SECONDS_BETWEEN_SAMPLES = 0.5
"""``RolloutSampled`` and ``PhaseAdvanced`` are limited to twice per second; unlimited they take 60 MB per day."""


class JsonlTracker(QueuedTracker):
    """Appends each event as one line: ``{"time": <unix seconds>, "event": "StepFinished", "step": 3, …}``.

    Episodes and groups are summarised (the full data is in the run's Parquet files). Lines are written within a second. A
    killed process may leave its last line truncated; the next one repairs it.

    Args:
        path: the file; its folder is created.
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
            self._waiting.put(skipped)  # the phase's final progress
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
    """Repair the last line: terminate it if it is complete, else truncate the file."""
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
