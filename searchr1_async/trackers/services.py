"""Trackers of services: Weights & Biases, TensorBoard (through tensorboardX) and Trackio.

Their common base sends numbers by optimiser step, and sampled episodes.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.episodes.table import transcript
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import EpisodeFinished, EvaluationFinished, Event, Notice, RunEnded, RunStarted, StepFinished
from searchr1_async.trackers.tracker import LONGEST_TEXT, QueuedTracker, Timed, plain

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
        close_within: as in :class:`~searchr1_async.trackers.tracker.QueuedTracker`.
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


class WandbTracker(StepTracker):
    """Logs a run to Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine.

    A resumed run continues the same W&B run: its id is stored in the run's folder.

    Args:
        project: W&B project.
        name: W&B run name; None uses the name of the run's folder.
        episodes_every: steps between two episode tables.
        episodes_shown: episodes per table; 0 disables them.
        init: further arguments of ``wandb.init`` (``entity``, ``group``, ``tags``, ``mode``, …).

    Raises:
        ConfigurationError: the package is not installed.
    """

    name = "Weights & Biases"

    def __init__(
        self,
        project: str = "searchr1_async",
        name: str | None = None,
        *,
        episodes_every: int = 10,
        episodes_shown: int = 4,
        **init: Any,
    ) -> None:
        super().__init__(episodes_every=episodes_every, episodes_shown=episodes_shown)
        self._wandb: Any = required("wandb", "wandb")
        self._init = {"project": project, "name": name} | init
        self._run: Any = None

    def begin(self, started: RunStarted) -> None:
        folder = Path(started.out_dir) if started.out_dir else None
        arguments: dict[str, Any] = {"job_type": started.kind, **self._init}
        if folder is not None:
            known = _known_id(folder)
            arguments["name"] = arguments["name"] or folder.name
            arguments.setdefault("dir", str(folder))
            if known and "id" not in arguments:
                arguments |= {"id": known, "resume": "allow"}
        settings = self._wandb.Settings(console="off", silent=True)  # do not capture the process's output
        arguments.setdefault("settings", settings)
        config = config_of(started) | arguments.pop("config", {})
        if self._run is not None:
            self._run.finish()
        # `create_new` leaves the user's other runs in the same notebook alone.
        self._run = self._wandb.init(**{"reinit": "create_new", "config": config, **arguments})
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if folder is not None:
            _id_file(folder).write_text(f"{self._run.id}\n", encoding="utf-8")

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        self._run.log({"step": step, **numbers})

    def log_episodes(self, step: int, episodes: Sequence[Episode]) -> None:
        rows = [list(episode_row(step, episode)) for episode in episodes]
        self._run.log({"step": step, "episodes": self._wandb.Table(columns=list(EPISODE_COLUMNS), data=rows)})

    def warn(self, text: str) -> None:
        # Alerts may be sent as mail: at most one per title in five minutes.
        self._run.alert(title="searchr1_async: warning", text=readable(text), level="WARN", wait_duration=300)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _id_file(folder: Path) -> Path:
    return folder / "wandb-run-id.txt"


def _known_id(folder: Path) -> str | None:
    with suppress(OSError):
        return _id_file(folder).read_text(encoding="utf-8").strip() or None
    return None


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


class TrackioTracker(StepTracker):
    """Logs a run to Trackio; ``trackio show`` displays it. A resumed run continues the Trackio run of the same name.

    Episodes are not logged: Trackio tables render Markdown, which is unsafe for model output.

    Args:
        project: Trackio project.
        name: Trackio run name; None uses the name of the run's folder.
        init: further arguments of ``trackio.init`` (``space_id``, ``group``, …).

    Raises:
        ConfigurationError: the package is not installed.
    """

    name = "Trackio"

    def __init__(self, project: str = "searchr1_async", name: str | None = None, **init: Any) -> None:
        super().__init__(episodes_shown=0)
        self._trackio: Any = required("trackio", "trackio")
        self._init = {"project": project, "name": name} | init
        self._run: Any = None

    def begin(self, started: RunStarted) -> None:
        arguments = dict(self._init)
        arguments["name"] = arguments["name"] or (Path(started.out_dir).name if started.out_dir else None)
        config = config_of(started) | arguments.pop("config", {})
        resume = "allow" if started.step and arguments["name"] else "never"
        # With embed=True it opens a dashboard in the notebook's cell.
        defaults = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False, "resume": resume}
        self._run = self._trackio.init(**{**defaults, "config": config, **arguments})

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        self._run.log(dict(numbers), step=step)

    def warn(self, text: str) -> None:
        self._run.alert(title="searchr1_async: warning", text=readable(text))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
