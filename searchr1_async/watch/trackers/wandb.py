"""Weights & Biases: curves, evaluations, a table of episodes now and then, alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from searchr1_async.episodes.types import Episode
from searchr1_async.events import RunStarted
from searchr1_async.watch.trackers.steps import EPISODE_COLUMNS, StepTracker, config_of, episode_row, readable, required


class WandbTracker(StepTracker):
    """Sends a run to Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine.

    A resumed run goes on in the same W&B run: its id lies in the run's folder.

    Args:
        project: W&B's project.
        name: of the W&B run; None takes that of the run's folder.
        episodes_every: steps between two tables of episodes.
        episodes_shown: episodes in a table; 0 for none.
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
        settings = self._wandb.Settings(console="off", silent=True)  # what the process prints is not the tracker's
        arguments.setdefault("settings", settings)
        config = config_of(started) | arguments.pop("config", {})
        if self._run is not None:
            self._run.finish()
        # `reinit` leaves another run of the user's own, in the same notebook, as it is.
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
        # An alert may be sent as mail: of the same title, one in five minutes.
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
