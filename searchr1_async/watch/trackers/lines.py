"""Events as plain values, one JSON line each, and the lines of a run read back. Pure, but for the reading of the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import orjson

from searchr1_async.episodes.types import Episode, Group
from searchr1_async.events import Event, RunEnded, RunStarted, WeightsPublished
from searchr1_async.watch.rows import storable

Values = dict[str, Any]
"""The fields of an event as plain JSON values; episodes and groups are told in a few figures."""

LONGEST_TEXT = 10_000
"""Characters that a line keeps of one text."""


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """One line of ``events.jsonl``."""

    time: float
    """Unix seconds."""
    name: str
    """The event's class, such as ``StepFinished``."""
    values: Values


def encoded(time: float, event: Event) -> bytes:
    """The line of an event, with its line end."""
    row = {"time": round(time, 3), "event": type(event).__name__} | event_values(event)
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def event_values(event: Event) -> Values:
    """An event's fields, without the bodies of episodes and groups. Numbers that are not finite become None."""
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
    """A value as JSON knows it; what is none is told by its text."""
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
    """The lines of an event log, in order. A file that is not there has none; it may be written while it is read.

    A last line without its end is still being written, or was cut off by a kill: it is left out, as is any line that is
    no event.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and (event := decoded(line)) is not None:
                yield event


def decoded(line: bytes) -> LoggedEvent | None:
    """One line; None if it is no event."""
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

    One ends with ``RunEnded``; after a kill the next begins with ``RunStarted``, before which it may have told of little more
    than its search's index.
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
    """The events of the session that played ``step``; of several, since a resumed run plays again what it had not finished,
    the last. Empty where none did.

    Args:
        step: None for the last session that came to new weights; where none did, the last that played.
    """
    played = sessions(events)
    if step is None:
        published = [session for session in played if any(event.name == WeightsPublished.__name__ for event in session)]
        return (published or [session for session in played if steps_of(session)] or [[]])[-1]
    return next((session for session in reversed(played) if step in steps_of(session)), [])


def steps_of(events: Iterable[LoggedEvent]) -> list[int]:
    """The steps whose batch was opened or worked on, ascending."""
    named = {"PipelineChanged", "MinibatchSubmitted", "BatchClosed", "GroupFinished", "GroupDropped"}
    return sorted({event.values["step"] for event in events if event.name in named and "step" in event.values})
