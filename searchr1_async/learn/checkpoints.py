"""The resume point: one small file that says exactly where a run stands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from searchr1_async.errors import CheckpointError, RunFolderError
from searchr1_async.files import write_atomically

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run stands after a finished step. Written whole or not at all, after the service has confirmed the checkpoint.

    All questions of a run are one stream of places: place p is question p mod N of epoch p div N. Groups start in that order
    and end in any, so where a run stands is one number and the few places before it that are still open. There is no
    random state beside: the shuffles are functions of the seed and the epoch, the seeds of sampling of the seed and the place.
    """

    step: int
    """Optimiser steps finished."""
    next_place: int
    """The first place whose group was never started; each before it is open, or held by a recorded step."""
    state_path: str
    """``tinker://`` path of the weights and the optimiser."""
    order_fingerprint: str
    """Of the question order in which places count."""
    base_model: str
    open_places: tuple[int, ...] = ()
    """Places whose group was started and is in no recorded step yet, neither trained on nor dropped: playing, or finished
    and kept in ``unlearned/``."""
    sampler_path: str | None = None
    """``tinker://`` path of the newest weights kept for sampling."""
    sampler_step: int | None = None
    """The step that ``sampler_path`` belongs to."""
    seconds: float = 0.0
    """Spent in reinforcement learning so far, all sessions together."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the run was started with; a resume with another is refused, naming what changed."""

    def is_open(self, place: int) -> bool:
        """Whether no recorded step holds the group of this place, so that it must be trained on or dropped yet."""
        return place >= self.next_place or place in self.open_places

    def save(self, folder: Path) -> None:
        """Replaces the run's resume point atomically.

        Raises:
            CheckpointError: the folder cannot be written (a full disk).
        """
        path = folder / "state.json"
        try:
            write_atomically(path, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode())
        except OSError as error:
            raise CheckpointError(
                f"the resume point {path} could not be written: {error.strerror or error}. The run's last resume point is "
                "still whole: make room and resume."
            ) from error

    @classmethod
    def load(cls, folder: Path) -> ResumePoint | None:
        """The resume point of a run's folder; None where it has none yet.

        Raises:
            RunFolderError: it cannot be read, or another version of the package wrote it.
        """
        path = folder / "state.json"
        try:
            values = json.loads(path.read_bytes())
            if (written := values.pop("format")) != _FORMAT:
                age = "an earlier" if written < _FORMAT else "a newer"
                raise RunFolderError(
                    f"{path} was written by {age} version of this package (format {written}, not {_FORMAT}), and cannot be "
                    "resumed with this one. Choose another out_dir, or resume with the version that began the run."
                )
            values["open_places"] = tuple(values["open_places"])
            return cls(**values)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be read: {error.strerror or error}. Choose another out_dir."
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunFolderError(f"{path} is no resume point: {error}. Choose another out_dir.") from error

    def refuse_changes(self, settings: Mapping[str, Any], order_fingerprint: str) -> None:
        """Refuses to go on with other settings or questions, since the steps before and after would not be one run.

        Raises:
            RunFolderError: naming what changed.
        """
        changed = list(_differences(self.settings, settings))
        if order_fingerprint != self.order_fingerprint:
            changed.append("the questions or their order")
        if changed:
            raise RunFolderError(
                "this folder holds a run with other settings (" + "; ".join(changed) + "). Choose another out_dir, or "
                "start with the same settings to resume."
            )


_ABSENT = object()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What changed, field by field: ``learning.learning_rate: 4e-05 then, 0.0001 now``."""
    for key in sorted({*then, *now}):
        before, after = then.get(key, _ABSENT), now.get(key, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {_shown(before)} then, {_shown(after)} now"


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)
