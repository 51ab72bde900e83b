"""Trackers: adapters that send a run's events to experiment trackers.

The run's folder always gets Parquet files (:mod:`searchr1_async.records.run_records`) and ``events.jsonl`` (:class:`JsonlTracker`).
Services are opt-in: ``train(..., trackers=("wandb", "tensorboard", MyTracker()))``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

from searchr1_async.boundary.settings import shown_with_kind
from searchr1_async.errors import ConfigurationError
from searchr1_async.trackers.services import StepTracker, TensorBoardTracker, TrackioTracker, WandbTracker
from searchr1_async.trackers.tracker import (
    EVENTS_FILE,
    JsonlTracker,
    LoggedEvent,
    QueuedTracker,
    Tracker,
    open_trackers,
    read_events,
    session_events,
    sessions,
    steps_of,
)

__all__ = [
    "EVENTS_FILE",
    "JsonlTracker",
    "LoggedEvent",
    "QueuedTracker",
    "StepTracker",
    "TensorBoardTracker",
    "Tracker",
    "TrackioTracker",
    "WandbTracker",
    "make_trackers",
    "open_trackers",
    "read_events",
    "session_events",
    "sessions",
    "steps_of",
]

_BY_NAME: dict[str, Callable[[Path | None], Tracker]] = {
    "wandb": lambda out_dir: WandbTracker(),
    "tensorboard": lambda out_dir: TensorBoardTracker(out_dir / "tensorboard" if out_dir else None),
    "trackio": lambda out_dir: TrackioTracker(),
}


def make_trackers(choice: str | Tracker | Iterable[str | Tracker], out_dir: Path | None = None) -> list[Tracker]:
    """The unopened trackers of a run: the event log if there is a folder, then the chosen ones.

    Args:
        choice: names (``"wandb"``, ``"tensorboard"``, ``"trackio"``) and custom trackers, of any class with the three methods of
            :class:`Tracker`.
        out_dir: the run's folder; None without one.

    Raises:
        ConfigurationError: an unknown name, an invalid tracker, or a missing package.
    """
    if not (isinstance(choice, str | Iterable) or callable(choice)):
        raise ConfigurationError(f"trackers is {shown_with_kind(choice)}: expected a list of names and trackers")
    chosen = [choice] if isinstance(choice, str) or callable(choice) else list(choice)
    out: list[Tracker] = [JsonlTracker(out_dir / EVENTS_FILE)] if out_dir is not None else []
    for item in chosen:
        if isinstance(item, str):
            out.append(_named(item)(out_dir))
        elif (
            callable(item) and hasattr(item, "__aenter__") and hasattr(item, "__aexit__") and not isinstance(item, type)
        ):
            out.append(item)
        else:
            hint = f" (pass an instance: {item.__name__}())" if isinstance(item, type) else ""
            raise ConfigurationError(
                f"{item!r} is no tracker{hint}: expected one of {', '.join(_BY_NAME)}, or a callable that takes events and is an "
                "async context manager"
            )
    return out


def _named(name: str) -> Callable[[Path | None], Tracker]:
    if (found := _BY_NAME.get(name)) is not None:
        return found
    near = difflib.get_close_matches(name.lower(), [*_BY_NAME, "jsonl", "parquet"], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near and near[0] in _BY_NAME else ""
    always = " The run's folder always has it." if near and near[0] not in _BY_NAME else ""
    raise ConfigurationError(f"unknown tracker {name!r}: choose from {', '.join(_BY_NAME)}.{hint}{always}")
