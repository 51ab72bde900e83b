"""Trackers: adapters that send a run's events to experiment trackers.

The run's folder always gets Parquet files (:mod:`searchr1_async.records.run_records`) and ``events.jsonl`` (:class:`JsonlTracker`).
Services are opt-in: ``train(..., trackers=("wandb", "tensorboard", MyTracker()))``.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.settings import shown_with_kind
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import EvaluationFinished, Event, Notice, RunStarted, StepFinished
from searchr1_async.trackers.tracker import (
    EVENTS_FILE,
    LONGEST_TEXT,
    JsonlTracker,
    LoggedEvent,
    QueuedTracker,
    Timed,
    Tracker,
    open_trackers,
    plain,
    read_events,
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
]

_ID_FILE = "wandb-run-id.txt"
WARNING = "searchr1_async: warning"
"""Title of alerts."""
_SETTINGS = ("kind", "model", "is_embedded", "embedder", "out_dir", "total_steps", "group_size", "groups_per_batch")


def _required(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"the {extra} tracker needs the package {module}, which failed to import ({error}): "
            f"pip install 'searchr1_async[{extra}]', or remove {extra!r} from trackers"
        ) from error


class StepTracker(QueuedTracker):
    """A tracker for services with curves. Subclasses override the hooks, which run in the tracker's thread."""

    def __init__(self) -> None:
        super().__init__(close_within=15.0)
        self._step: int | None = None
        """None until the run starts: earlier events are in the event log only."""
        self._run: Any = None
        """The run object of the service."""

    def begin(self, started: RunStarted) -> None:
        """The run starts or resumes."""
        raise NotImplementedError

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        """Log the finite numbers of one optimizer step; ``moment`` is in unix seconds."""
        raise NotImplementedError

    def warn(self, text: str) -> None:
        """Show a warning, in which control characters and bidi marks are escaped."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def wants(self, event: Event, now: float) -> bool:
        is_warning = isinstance(event, Notice) and event.is_warning
        return is_warning or isinstance(event, RunStarted | StepFinished | EvaluationFinished)

    def write(self, batch: Sequence[Timed]) -> None:
        for moment, event in batch:
            if isinstance(event, RunStarted):
                if self._run is not None:
                    self.close()
                self.begin(event)
                self._step = event.step
            elif self._step is None:
                continue
            elif isinstance(event, StepFinished):
                self._step = event.step
                self.log_numbers(event.step, _finite(event.metrics), moment)
            elif isinstance(event, EvaluationFinished):
                numbers = _finite({f"evaluation/{name}": value for name, value in event.metrics.items()})
                self.log_numbers(self._step if event.step is None else event.step, numbers, moment)
            elif isinstance(event, Notice):
                text = event.text[:LONGEST_TEXT]
                self.warn("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


def _config(started: RunStarted) -> dict[str, Any]:
    """The run's configuration as plain values; it has no secrets."""
    return plain({**started.settings, **{name: getattr(started, name) for name in _SETTINGS}})


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {str(plain(name)): float(value) for name, value in numbers.items() if math.isfinite(value)}


class WandbTracker(StepTracker):
    """Logs a run to Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine.

    A resumed run continues the same W&B run: its id is stored in the run's folder.

    Args:
        project: W&B project.
        name: W&B run name; None uses the name of the run's folder.
        init: further arguments of ``wandb.init`` (``entity``, ``group``, ``tags``, ``mode``, …).

    Raises:
        ConfigurationError: the package is not installed.
    """

    name = "Weights & Biases"

    def __init__(self, project: str = "searchr1_async", name: str | None = None, **init: Any) -> None:
        super().__init__()
        self._wandb: Any = _required("wandb", "wandb")
        self._init = {"project": project, "name": name} | init

    def begin(self, started: RunStarted) -> None:
        arguments: dict[str, Any] = {
            "job_type": started.kind,
            "settings": self._wandb.Settings(console="off", silent=True),  # do not capture the process's output
            "reinit": "create_new",  # leave the user's other runs in the same notebook alone
            **self._init,
            "config": _config(started) | self._init.get("config", {}),
        }
        folder = Path(started.out_dir) if started.out_dir else None
        if folder is not None:
            arguments = {"dir": str(folder)} | arguments | {"name": arguments["name"] or folder.name}
            with suppress(OSError):
                if known := (folder / _ID_FILE).read_text(encoding="utf-8").strip():
                    arguments = {"id": known, "resume": "allow"} | arguments
        self._run = self._wandb.init(**arguments)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if folder is not None:
            (folder / _ID_FILE).write_text(f"{self._run.id}\n", encoding="utf-8")

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        self._run.log({"step": step, **numbers})

    def warn(self, text: str) -> None:
        # Alerts may be sent as mail: at most one per title in five minutes.
        self._run.alert(title=WARNING, text=text, level="WARN", wait_duration=300)


class TensorBoardTracker(StepTracker):
    """Writes event files for ``tensorboard --logdir FOLDER``. A resumed run replaces the steps that it redoes.

    Args:
        folder: output; None uses ``tensorboard`` in the run's folder, or in the working directory for a run without one.

    Raises:
        ConfigurationError: the package is not installed.
    """

    name = "TensorBoard"

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self._tensorboard: Any = _required("tensorboardX", "tensorboard")
        self._folder = absolute_path(folder, "folder") if folder is not None else None

    def begin(self, started: RunStarted) -> None:
        folder = self._folder or Path(started.out_dir or ".") / "tensorboard"
        purge = {"purge_step": started.step + 1} if started.step else {}
        # File names have a resolution of one second: without a suffix a quick resume would overwrite them.
        suffix = f".from-{started.step:09d}"
        self._run = self._tensorboard.SummaryWriter(str(folder), flush_secs=5, filename_suffix=suffix, **purge)
        self._run.add_text("settings", _block(json.dumps(_config(started), indent=2)), started.step)

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        for name, value in numbers.items():
            self._run.add_scalar(name, value, step, walltime=moment)

    def warn(self, text: str) -> None:
        self._run.add_text("warnings", _block(text), self._step)

    def close(self) -> None:
        if self._run is not None:
            self._run.close()


def _block(text: str) -> str:
    """Verbatim Markdown: an indented block, which unlike a fence no text can close."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class TrackioTracker(StepTracker):
    """Logs a run to Trackio; ``trackio show`` displays it. A resumed run continues the Trackio run of the same name.

    Args:
        project: Trackio project.
        name: Trackio run name; None uses the name of the run's folder.
        init: further arguments of ``trackio.init`` (``space_id``, ``group``, …).

    Raises:
        ConfigurationError: the package is not installed.
    """

    name = "Trackio"

    def __init__(self, project: str = "searchr1_async", name: str | None = None, **init: Any) -> None:
        super().__init__()
        self._trackio: Any = _required("trackio", "trackio")
        self._init = {"project": project, "name": name} | init

    def begin(self, started: RunStarted) -> None:
        name = self._init["name"] or (Path(started.out_dir).name if started.out_dir else None)
        resume = "allow" if started.step and name else "never"
        # With embed=True it opens a dashboard in the notebook's cell.
        defaults = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False, "resume": resume}
        config = _config(started) | self._init.get("config", {})
        self._run = self._trackio.init(**{**defaults, **self._init, "name": name, "config": config})

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        self._run.log(dict(numbers), step=step)

    def warn(self, text: str) -> None:
        self._run.alert(title=WARNING, text=text)


_BY_NAME: dict[str, Callable[[], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
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
    log: list[Tracker] = [JsonlTracker(out_dir / EVENTS_FILE)] if out_dir is not None else []
    return [*log, *map(_made, chosen)]


def _made(item: str | Tracker) -> Tracker:
    if isinstance(item, str) and item in _BY_NAME:
        return _BY_NAME[item]()
    if isinstance(item, str | type) or not (
        callable(item) and hasattr(item, "__aenter__") and hasattr(item, "__aexit__")
    ):
        raise ConfigurationError(
            f"{item!r} is no tracker: choose from {', '.join(_BY_NAME)}, or pass an instance that takes events and is an async "
            f"context manager. The run's folder always has Parquet files and {EVENTS_FILE}"
        )
    return item
