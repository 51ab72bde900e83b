"""The resume point: one small file that says exactly where a run stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from searchr1_async.errors import CheckpointError, RunFolderError
from searchr1_async.files import write_atomically

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run stands after a finished step. Written whole or not at all, after the service has confirmed the checkpoint."""

    step: int
    """Optimiser steps finished."""
    position: int
    """Questions consumed, over all epochs: the next batch begins behind them."""
    state_path: str
    """``tinker://`` path of the weights and the optimiser."""
    order_fingerprint: str
    """Of the question order that ``position`` counts in."""
    base_model: str
    sampler_path: str | None = None
    """``tinker://`` path of the newest weights kept for sampling."""
    sampler_step: int | None = None
    """The step that ``sampler_path`` belongs to."""
    seconds: float = 0.0
    """Spent in reinforcement learning so far, all sessions together."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the run was started with; a resume with another is refused, naming what changed."""

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
            RunFolderError: it cannot be read, or a newer version of the package wrote it.
        """
        path = folder / "state.json"
        try:
            values = json.loads(path.read_bytes())
            if values.pop("format") != _FORMAT:
                raise RunFolderError(f"{path} was written by another version of this package")
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
        changed = [
            f"{key}: {self.settings.get(key)!r} then, {settings.get(key)!r} now"
            for key in sorted({*self.settings, *settings})
            if self.settings.get(key) != settings.get(key)
        ]
        if order_fingerprint != self.order_fingerprint:
            changed.append("the questions or their order")
        if changed:
            raise RunFolderError(
                "this folder holds a run with other settings (" + "; ".join(changed) + "). Choose another out_dir, or "
                "start with the same settings to resume."
            )
