"""Base of service trackers: numbers by optimiser step, sampled episodes, warnings."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from searchr1_async.episodes.table import transcript
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import (
    EpisodeFinished,
    EvaluationFinished,
    Event,
    Notice,
    RunEnded,
    RunStarted,
    StepFinished,
)
from searchr1_async.watch.trackers.base import QueuedTracker, Timed
from searchr1_async.watch.trackers.lines import LONGEST_TEXT, plain

EPISODE_COLUMNS = ("step", "suite", "question", "golden answers", "answer", "reward", "turns", "stop", "transcript")


def required(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ConfigurationError: it is not installed; names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"the {extra} tracker needs the package {module}, which failed to import ({error}): "
            f"pip install 'searchr1_async[{extra}]', or remove {extra!r} from trackers"
        ) from error


class StepTracker(QueuedTracker):
    """A tracker for services with curves. Subclasses override the four hooks, which run in the tracker's thread.

    Args:
        episodes_every: steps between two samples of full episodes; step 1 is always sampled.
        episodes_shown: episodes per sample; 0 disables them.
        close_within: as in :class:`~searchr1_async.watch.trackers.base.QueuedTracker`.
    """

    def __init__(self, *, episodes_every: int = 10, episodes_shown: int = 4, close_within: float = 15.0) -> None:
        super().__init__(close_within=close_within)
        if episodes_every < 1 or episodes_shown < 0:
            raise ConfigurationError(
                f"episodes_every is {episodes_every} and episodes_shown {episodes_shown}: must be at least 1 and 0"
            )
        self._episodes_every = episodes_every
        self._episodes_shown = episodes_shown
        self._queued_of_step: dict[int, int] = {}
        self._episodes: dict[int, list[Episode]] = {}
        self._step = 0
        self._has_begun = False

    def begin(self, started: RunStarted) -> None:
        """The run starts or resumes."""
        raise NotImplementedError

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        """Log the finite numbers of one optimiser step; ``moment`` is in unix seconds."""
        raise NotImplementedError

    def log_episodes(self, step: int, episodes: Sequence[Episode]) -> None:
        """Log sampled episodes."""

    def warn(self, text: str) -> None:
        """Show a warning."""

    def wants(self, event: Event, now: float) -> bool:
        if isinstance(event, EpisodeFinished):
            return self._is_shown(event.step)
        return isinstance(event, RunStarted | StepFinished | EvaluationFinished | RunEnded) or (
            isinstance(event, Notice) and event.is_warning
        )

    def _is_shown(self, step: int) -> bool:
        """Whether to queue one more episode of the step; limited because an episode may take megabytes."""
        if step != 1 and step % self._episodes_every:
            return False
        if step not in self._queued_of_step:
            self._queued_of_step = {step: 0} | {
                other: n for other, n in self._queued_of_step.items() if other >= step - 8
            }
        self._queued_of_step[step] += 1
        return self._queued_of_step[step] <= self._episodes_shown

    def write(self, batch: Sequence[Timed]) -> None:
        for moment, event in batch:
            match event:
                case RunStarted():
                    self._step = event.step
                    self.begin(event)
                    self._has_begun = True
                case _ if not self._has_begun:
                    pass  # no run to log to yet; the event log has it
                case EpisodeFinished(episode, step):
                    self._episodes.setdefault(step, []).append(episode)
                case StepFinished(step, metrics):
                    self._step = step
                    self.log_numbers(step, _finite(metrics), moment)
                    if episodes := self._episodes.pop(step, None):
                        self.log_episodes(step, episodes)
                    self._episodes = {other: kept for other, kept in self._episodes.items() if other > step}
                case EvaluationFinished():
                    numbers = {f"evaluation/{name}": value for name, value in event.metrics.items()}
                    self.log_numbers(self._step if event.step is None else event.step, _finite(numbers), moment)
                case Notice(text):
                    self.warn(text)


def config_of(started: RunStarted) -> dict[str, Any]:
    """The run's configuration as plain values."""
    own = {
        "kind": started.kind,
        "model": started.model,
        "is_embedded": started.is_embedded,
        "embedder": started.embedder,
        "out_dir": started.out_dir,
        "total_steps": started.total_steps,
        "group_size": started.group_size,
        "groups_per_batch": started.groups_per_batch,
    }
    return plain({**started.settings, **own})


def episode_row(step: int, episode: Episode) -> tuple[Any, ...]:
    """An episode under :data:`EPISODE_COLUMNS`; texts are truncated at 10,000 characters."""
    return (
        step,
        readable(episode.question.data_source),
        readable(episode.question.question),
        readable(" | ".join(episode.question.golden_answers)),
        readable(episode.answer or ""),
        float(episode.reward),
        len(episode.turns),
        episode.stop_reason.value,
        readable(transcript(episode)),
    )


def readable(text: str) -> str:
    """``text`` truncated at 10,000 characters, control characters and bidi marks escaped."""
    cut = (
        text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}\n… {len(text) - LONGEST_TEXT:,} more characters"
    )
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in cut)


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {str(plain(name)): float(value) for name, value in numbers.items() if math.isfinite(value)}
