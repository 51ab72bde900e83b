"""Conversion between events and JSON lines. Pure, except for reading the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import orjson

from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.events import Event, RunEnded, RunStarted, WeightsPublished

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
