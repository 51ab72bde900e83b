"""Trackio: curves on this machine or in a Space, with W&B's API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchr1_async.events import RunStarted
from searchr1_async.watch.trackers.steps import StepTracker, config_of, readable, required


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
