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
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import anyio
import anyio.to_thread
import orjson

from searchr1_async.boundary.paths import absolute_path, write_all
from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.events import (
    Event,
    PhaseAdvanced,
    PhaseEnded,
    RolloutSampled,
    RunEnded,
    RunStarted,
    WeightsPublished,
)

logger = logging.getLogger(__name__)

Timed = tuple[float, Event]
"""An event and its arrival time in unix seconds."""

SECONDS_BETWEEN_BATCHES = 0.5
MAX_WAITING = 100_000
"""Maximum queued events per tracker; later ones are lost, with one warning. At 1,000 episodes per second it fills within two
minutes if the service takes nothing."""


class Tracker(Protocol):
    """Receives a run's events; the run opens and closes it."""

    def __call__(self, event: Event) -> None:
        """Record ``event``. Called on the event loop's thread: return within microseconds, without blocking or raising."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        self._close_within = close_within
        self._clock = clock
        self._waiting: queue.SimpleQueue[Timed] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_dropped = False
        self._is_full = False

    @property
    def is_dropped(self) -> bool:
        """It failed and receives no more events."""
        return self._is_dropped

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
        if self._is_dropped or self._ending.is_set():
            return
        now = self._clock()
        if not self.wants(event, now):
            return
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put((now, event))
        elif not self._is_full:
            self._is_full = True
            logger.warning("%s is too slow: %d events are queued, further ones are lost to it", self.name, MAX_WAITING)

    async def __aenter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError(f"{self.name} was already opened: a tracker serves one run")
        # Own daemon thread: a hanging service must neither occupy the pool nor keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread = self._thread
        assert thread is not None
        self._ending.set()
        with anyio.CancelScope(shield=True):  # flush even if the run was cancelled
            await anyio.to_thread.run_sync(thread.join, self._close_within)
        if thread.is_alive():
            self._is_dropped = True
            logger.warning(
                "%s did not accept the run's last events within %g s and was abandoned", self.name, self._close_within
            )

    def _work(self) -> None:
        is_open = False
        try:
            self.open()
            is_open = True
            while not self._ending.is_set():
                self._ending.wait(SECONDS_BETWEEN_BATCHES)
                if batch := self._taken():
                    self.write(batch)
            if batch := self._taken():
                self.write(batch)
            is_open = False
            self.close()
        except BaseException:  # a service's client may even raise SystemExit
            self._is_dropped = True
            logger.warning("%s failed and receives no more events; the run continues", self.name, exc_info=True)
            if is_open:
                with suppress(Exception):
                    self.close()
            self._taken()

    def _taken(self) -> list[Timed]:
        """Drain the queue."""
        batch: list[Timed] = []
        with suppress(queue.Empty):
            for _ in range(self._waiting.qsize()):
                batch.append(self._waiting.get_nowait())
        return batch


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


Values = dict[str, Any]
"""An event's fields as plain JSON values; episodes and groups are summarised."""

LONGEST_TEXT = 10_000
"""Maximum characters kept of one text."""


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """A line of ``events.jsonl``."""

    time: float
    """Unix seconds."""
    name: str
    """The event's class name, such as ``StepFinished``."""
    values: Values


def encoded(time: float, event: Event) -> bytes:
    """An event as a line, newline included."""
    row = {"time": round(time, 3), "event": type(event).__name__} | event_values(event)
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def event_values(event: Event) -> Values:
    """An event's fields, episodes and groups summarised. Non-finite numbers become None."""
    out: Values = {}
    for field in fields(event):
        value = getattr(event, field.name)
        if isinstance(value, Episode):
            out |= _episode(value)
        elif isinstance(value, Group):
            out |= _group(value)
        else:
            out[field.name] = plain(value)
    return out


def plain(value: Any) -> Any:
    """``value`` as JSON-compatible data, by its ``str`` if it is not."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else float(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return storable(str(value)[:LONGEST_TEXT])
    if isinstance(value, Mapping):
        return {storable(str(name)): plain(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return storable(str(value)[:LONGEST_TEXT])


def _episode(episode: Episode) -> Values:
    return {
        "question_id": plain(episode.question.id),
        "data_source": plain(episode.question.data_source),
        "reward": plain(float(episode.reward)),
        "correct": plain(episode.reward_parts.get("correct")),
        "turns": len(episode.turns),
        "searches": sum(len(call.results) for call in episode.calls),
        "seconds": plain(float(episode.seconds)),
        "model_seconds": plain(float(sum(turn.seconds for turn in episode.turns))),
        "search_seconds": plain(float(sum(call.seconds for call in episode.calls))),
        "stop_reason": episode.stop_reason.value,
        "policy_versions": sorted({turn.policy_version for turn in episode.turns}),
    }


def _group(group: Group) -> Values:
    rewards = group.rewards
    return {
        "question_id": plain(group.question.id),
        "data_source": plain(group.question.data_source),
        "episodes": len(group.episodes),
        "failed": len(group.failed),
        "reward": plain(sum(rewards) / len(rewards)) if rewards else None,
        "is_constant": group.is_constant,
        "seconds": plain(max((float(episode.seconds) for episode in group.episodes), default=0.0)),
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
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, dict):
        return None
    time, name = row.pop("time", None), row.pop("event", None)
    if not isinstance(time, int | float) or isinstance(time, bool) or not isinstance(name, str):
        return None
    return LoggedEvent(float(time), name, row)


def sessions(events: Iterable[LoggedEvent]) -> list[list[LoggedEvent]]:
    """The events of each process that worked on the run, oldest first.

    A session ends with ``RunEnded``; after a kill, the next ``RunStarted`` starts a new one.
    """
    out: list[list[LoggedEvent]] = []
    is_over, has_begun = True, False
    for event in events:
        begins = event.name == RunStarted.__name__
        if is_over or (begins and has_begun):
            out.append([])
            has_begun = False
        out[-1].append(event)
        has_begun |= begins
        is_over = event.name == RunEnded.__name__
    return out


def session_events(events: Iterable[LoggedEvent], step: int | None = None) -> list[LoggedEvent]:
    """The events of the last session that rolled out ``step`` (a resumed run redoes unfinished steps); empty if none did.

    Args:
        step: None for the last session that published weights, else the last one with any step.
    """
    by_session = sessions(events)
    if step is None:
        published = [
            session for session in by_session if any(event.name == WeightsPublished.__name__ for event in session)
        ]
        return (published or [session for session in by_session if steps_of(session)] or [[]])[-1]
    return next((session for session in reversed(by_session) if step in steps_of(session)), [])


def steps_of(events: Iterable[LoggedEvent]) -> list[int]:
    """The steps whose batch was opened or worked on, ascending."""
    named = {"PipelineChanged", "MinibatchSubmitted", "BatchClosed", "GroupFinished", "GroupDropped"}
    return sorted({event.values["step"] for event in events if event.name in named and "step" in event.values})


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
