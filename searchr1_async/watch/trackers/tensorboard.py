"""TensorBoard: curves and texts as event files, written by tensorboardX."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.episodes.types import Episode
from searchr1_async.events import RunStarted
from searchr1_async.watch.trackers.steps import EPISODE_COLUMNS, StepTracker, config_of, episode_row, readable, required


class TensorBoardTracker(StepTracker):
    """Writes event files for ``tensorboard --logdir FOLDER``. A resumed run replaces the steps that it redoes.

    Args:
        folder: output; None uses ``tensorboard`` in the run's folder, or in the working directory for a run without one.
        episodes_every: steps between two samples of episodes.
        episodes_shown: episodes per sample; 0 disables them.

    Raises:
        ConfigurationError: the package is not installed.
    """

    name = "TensorBoard"

    def __init__(self, folder: str | Path | None = None, *, episodes_every: int = 10, episodes_shown: int = 4) -> None:
        super().__init__(episodes_every=episodes_every, episodes_shown=episodes_shown)
        self._tensorboard: Any = required("tensorboardX", "tensorboard")
        self._folder = absolute_path(folder, "folder") if folder is not None else None
        self._writer: Any = None

    def begin(self, started: RunStarted) -> None:
        folder = self._folder or Path(started.out_dir or ".") / "tensorboard"
        if self._writer is not None:
            self._writer.close()
        purge = {"purge_step": started.step + 1} if started.step else {}
        # File names have a resolution of one second: without a suffix a quick resume would overwrite them.
        suffix = f".from-{started.step:09d}"
        self._writer = self._tensorboard.SummaryWriter(str(folder), flush_secs=5, filename_suffix=suffix, **purge)
        self._writer.add_text("settings", _block(json.dumps(config_of(started), indent=2)), started.step)

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=moment)

    def log_episodes(self, step: int, episodes: Sequence[Episode]) -> None:
        for number, episode in enumerate(episodes, start=1):
            fields = zip(EPISODE_COLUMNS, episode_row(step, episode), strict=True)
            self._writer.add_text(f"episode {number}", _block("\n".join(f"{n}: {v}" for n, v in fields)), step)

    def warn(self, text: str) -> None:
        self._writer.add_text("warnings", _block(readable(text)), self._step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _block(text: str) -> str:
    """Verbatim Markdown: an indented block, which unlike a fence no text can close."""
    return "\n".join(f"    {line}" for line in text.splitlines())
