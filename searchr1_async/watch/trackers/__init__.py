"""Trackers: small adapters that take a run's events to where curves are kept.

The run's own folder always gets its Parquet files (:mod:`searchr1_async.watch.records`) and ``events.jsonl``
(:class:`JsonlTracker`). Services come by choice: ``train(..., trackers=("wandb", "tensorboard", MyTracker()))``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

from searchr1_async.boundary.values import shown_with_kind
from searchr1_async.errors import ConfigurationError
from searchr1_async.watch.trackers.base import QueuedTracker, Tracker, open_trackers
from searchr1_async.watch.trackers.jsonl import EVENTS_FILE, JsonlTracker
from searchr1_async.watch.trackers.lines import LoggedEvent, read_events, session_events, sessions, steps_of
from searchr1_async.watch.trackers.steps import StepTracker
from searchr1_async.watch.trackers.tensorboard import TensorBoardTracker
from searchr1_async.watch.trackers.trackio import TrackioTracker
from searchr1_async.watch.trackers.wandb import WandbTracker

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
    """The trackers of a run, not open yet: the event log where there is a folder for it, then those that are chosen.

    Args:
        choice: names (``"wandb"``, ``"tensorboard"``, ``"trackio"``) and trackers of one's own, which may be of any class
            that has a :class:`Tracker`'s three methods.
        out_dir: the run's folder; None for work that keeps none.

    Raises:
        ConfigurationError: an unknown name, something that is no tracker, or a package that is not installed.
    """
    if not (isinstance(choice, str | Iterable) or callable(choice)):
        raise ConfigurationError(f"trackers is {shown_with_kind(choice)}: give a list of names and trackers")
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
            hint = f" (give an object: {item.__name__}())" if isinstance(item, type) else ""
            raise ConfigurationError(
                f"{item!r} is no tracker{hint}: name one of {', '.join(_BY_NAME)}, or give an object that takes events when "
                "called and is an async context manager"
            )
    return out


def _named(name: str) -> Callable[[Path | None], Tracker]:
    if (found := _BY_NAME.get(name)) is not None:
        return found
    near = difflib.get_close_matches(name.lower(), [*_BY_NAME, "jsonl", "parquet"], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near and near[0] in _BY_NAME else ""
    always = " The run's folder has it always." if near and near[0] not in _BY_NAME else ""
    raise ConfigurationError(f"unknown tracker {name!r}: choose from {', '.join(_BY_NAME)}.{hint}{always}")
