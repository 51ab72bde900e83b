"""Trackio: curves on this machine or in a Space, with the interface of W&B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchr1_async.events import RunStarted
from searchr1_async.watch.trackers.steps import StepTracker, config_of, readable, required


class TrackioTracker(StepTracker):
    """Keeps a run in Trackio; ``trackio show`` draws it. A resumed run goes on in the Trackio run of its name.

    It has no episodes: its tables take their text for Markdown, which a model's output must not be.

    Args:
        project: Trackio's project.
        name: of the Trackio run; None takes that of the run's folder.
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
        # Without `embed=False` it would open a dashboard in the notebook's cell; its measurements of the machine are not ours.
        defaults = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False, "resume": resume}
        self._run = self._trackio.init(**{**defaults, "config": config, **arguments})

    def log_numbers(self, step: int, numbers: Mapping[str, float], moment: float) -> None:
        self._run.log(dict(numbers), step=step)

    def warn(self, text: str) -> None:
        self._run.alert(title="searchr1_async: warning", text=readable(text))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
