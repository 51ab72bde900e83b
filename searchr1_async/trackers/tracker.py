"""What a tracker is: the interface, a base class with a queue and one worker thread, and the event log.

The log, ``events.jsonl``, is a tracker that is always on; events become JSON lines here, and lines events.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import anyio
import anyio.to_thread
import orjson

from searchr1_async.boundary.paths import absolute_path, write_all
from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.events import Event, PhaseAdvanced, RolloutSampled

logger = logging.getLogger(__name__)

Timed = tuple[float, Event]
"""An event and its arrival time in unix seconds."""
SECONDS_BETWEEN_BATCHES = 0.5
MAX_WAITING = 100_000
"""Maximum queued events per tracker; later ones are lost, with one warning."""
LONGEST_TEXT = 10_000
"""Maximum characters kept of one text."""
EVENTS_FILE = "events.jsonl"
"""File name in a run's folder."""
_LAST_BYTES = 1 << 18
"""Of a log, in which its last session's end stands."""
SECONDS_BETWEEN_SAMPLES = 0.5
"""``RolloutSampled`` and ``PhaseAdvanced`` are limited to twice per second; unlimited they take 60 MB per day."""


class Tracker(Protocol):
    """Receives a run's events; the run opens and closes it."""

    def __call__(self, event: Event) -> None:
        """Record ``event``. Called on the event loop's thread: return within microseconds, without blocking or raising."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *raised: Any) -> None:
        """Flush within a few seconds; a hanging service must not delay the end of the run."""
        ...


class QueuedTracker:
    """Tracker with a queue: its own thread writes events twice per second.

    Subclasses override :meth:`open`, :meth:`write` and :meth:`close`, which all run in that thread, and optionally :meth:`wants`.
    If one of them raises, the tracker is dropped with one warning and the run continues.

    Args:
        close_within: maximum seconds that the end of the run waits for the flush. Later events are lost; the daemon thread is
            abandoned.
        clock: unix seconds.
    """

    name = "tracker"

    def __init__(self, *, close_within: float = 10.0, clock: Callable[[], float] = time.time) -> None:
        self._close_within, self._clock = close_within, clock
        self._waiting: queue.SimpleQueue[Timed] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_lost = False
        self.is_dropped = False
        """It failed and receives no more events."""

    def open(self) -> None:
        """Set up; called once, first."""

    def wants(self, event: Event, now: float) -> bool:
        """Whether to queue ``event``. Called on the event loop: must not block."""
        return True

    def write(self, batch: Sequence[Timed]) -> None:
        """Write these events, in order."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush; called once, last, unless an earlier call failed."""

    def __call__(self, event: Event) -> None:
        now = self._clock()
        if self.is_dropped or self._ending.is_set() or not self.wants(event, now):
            return
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put((now, event))
        elif not self._has_lost:
            self._has_lost = True
            logger.warning("%s is too slow: %d events are queued, further ones are lost to it", self.name, MAX_WAITING)

    async def __aenter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError(f"{self.name} was already opened: a tracker serves one run")
        # Own daemon thread: a hanging service must neither occupy the pool nor keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *raised: object) -> None:
        thread = self._thread
        assert thread is not None
        self._ending.set()
        with anyio.CancelScope(shield=True):  # flush even if the run was cancelled
            await anyio.to_thread.run_sync(thread.join, self._close_within)
        if thread.is_alive():
            self.is_dropped = True
            logger.warning(
                "%s did not accept the run's last events within %g s and was abandoned", self.name, self._close_within
            )

    def _work(self) -> None:
        is_open = False
        try:
            self.open()
            is_open = True
            is_last = False
            while not is_last:
                is_last = self._ending.wait(SECONDS_BETWEEN_BATCHES)
                if batch := [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]:
                    self.write(batch)
            is_open = False
            self.close()
        except BaseException:  # a service's client may even raise SystemExit
            self.is_dropped = True
            logger.warning("%s failed and receives no more events; the run continues", self.name, exc_info=True)
            if is_open:
                with suppress(Exception):
                    self.close()


@asynccontextmanager
async def open_trackers(trackers: Sequence[Tracker]) -> AsyncIterator[tuple[Tracker, ...]]:
    """Open trackers for the duration of the block; those that fail to open are skipped with a warning.

    They are closed concurrently, so several that hang take only as long as the slowest.
    """
    opened: list[Tracker] = []
    try:
        for tracker in trackers:
            try:
                opened.append(await tracker.__aenter__())
            except Exception:
                logger.warning("tracker %r could not be opened; the run continues without it", tracker, exc_info=True)
        yield tuple(opened)
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for tracker in opened:
                    group.start_soon(_closed, tracker)


async def _closed(tracker: Tracker) -> None:
    try:
        await tracker.__aexit__(None, None, None)
    except Exception:
        logger.warning("tracker %r could not be closed", tracker, exc_info=True)


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """A line of ``events.jsonl``."""

    time: float
    """Unix seconds."""
    name: str
    """The event's class name, such as ``StepFinished``."""
    values: dict[str, Any]


def encoded(time: float, event: Event) -> bytes:
    """An event as a line, newline included; episodes and groups are summarised."""
    row = {"time": round(time, 3), "event": type(event).__name__}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, Episode):
            row |= _episode(value)
        elif isinstance(value, Group):
            row |= _group(value)
        else:
            row[name] = value
    return orjson.dumps(plain(row), option=orjson.OPT_APPEND_NEWLINE)


def plain(value: Any) -> Any:
    """``value`` as JSON-compatible data, by its ``str`` if it is not. Non-finite numbers become None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else float(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {storable(str(name)): plain(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return storable(str(value)[:LONGEST_TEXT])


def _episode(episode: Episode) -> dict[str, Any]:
    return {
        "question_id": episode.question.id,
        "data_source": episode.question.data_source,
        "reward": float(episode.reward),
        "correct": episode.reward_parts.get("correct"),
        "turns": len(episode.turns),
        "searches": sum(len(call.results) for call in episode.calls),
        "seconds": float(episode.seconds),
        "model_seconds": float(sum(turn.seconds for turn in episode.turns)),
        "search_seconds": float(sum(call.seconds for call in episode.calls)),
        "stop_reason": episode.stop_reason.value,
        "policy_versions": sorted({turn.policy_version for turn in episode.turns}),
    }


def _group(group: Group) -> dict[str, Any]:
    rewards = group.rewards
    return {
        "question_id": group.question.id,
        "data_source": group.question.data_source,
        "episodes": len(group.episodes),
        "failed": len(group.failed),
        "reward": sum(rewards) / len(rewards) if rewards else None,
        "is_constant": group.is_constant,
        "seconds": max((float(episode.seconds) for episode in group.episodes), default=0.0),
        "policy_versions": list(group.policy_versions),
    }


def read_events(path: Path) -> Iterator[LoggedEvent]:
    """The events of a log, in order; none if the file is missing. The file may be written concurrently.

    Lines that are not events are skipped, as is an unterminated last line (still being written, or truncated by a kill).
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and (event := decoded(line)) is not None:
                yield event


def decoded(line: bytes) -> LoggedEvent | None:
    """Parse one line; None if it is not an event."""
    try:
        row = orjson.loads(line)
        return LoggedEvent(float(row.pop("time")), str(row.pop("event")), row)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def end_reason(path: Path) -> str | None:
    """Why the last session in a log ended (:data:`~searchr1_async.events.EndReason`); None if it does not say, as after a kill."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for event in map(decoded, reversed(lines)):
        if event is not None and event.name in ("RunStarted", "RunEnded"):
            return event.values.get("reason")
    return None


class JsonlTracker(QueuedTracker):
    """Appends each event as one line: ``{"time": <unix seconds>, "event": "StepFinished", "step": 3, …}``.

    Episodes and groups are summarised (the full data is in the run's Parquet files). Lines are written within a second.

    Args:
        path: the file; its folder is created.
        clock: unix seconds.
    """

    name = "the event log"

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(close_within=5.0, clock=clock)
        self._path = absolute_path(path)
        self._file: BinaryIO | None = None
        self._written_at: dict[str, float] = {}
        """Of events that are limited, by kind and phase."""

    def wants(self, event: Event, now: float) -> bool:
        if not isinstance(event, RolloutSampled | PhaseAdvanced):
            return True
        kind = event.phase if isinstance(event, PhaseAdvanced) else ""
        if now - self._written_at.get(kind, -math.inf) < SECONDS_BETWEEN_SAMPLES:
            return False
        self._written_at[kind] = now
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
    """End a line that a kill truncated, so that the next one is whole; readers skip it."""
    if path.exists() and path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
