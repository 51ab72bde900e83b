"""Weights & Biases: curves, evaluations, tables of sampled episodes, alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from searchr1_async.episodes.types import Episode
from searchr1_async.events import RunStarted
from searchr1_async.watch.trackers.steps import EPISODE_COLUMNS, StepTracker, config_of, episode_row, readable, required


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
