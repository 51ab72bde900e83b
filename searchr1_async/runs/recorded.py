"""A run read from its folder, running or ended."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import polars as pl
import tinker

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.settings import checked_arguments
from searchr1_async.config import AskConfig, TrainConfig
from searchr1_async.config.configs import takes_config
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.events import Emit
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.ask import Answer, LiveAnswers, ask, asked_question
from searchr1_async.runs.checkpoints import KeptCheckpoint, ResumePoint, best_checkpoint, kept_checkpoints
from searchr1_async.runs.export import export
from searchr1_async.runs.folder import CONFIG_FILE, TrainingResult, is_claimed, result_of
from searchr1_async.runs.rollouts import ServiceChoice
from searchr1_async.runs.weights import Step, find_weights
from searchr1_async.search.search import Search
from searchr1_async.service.connection import ServiceName
from searchr1_async.trackers import EVENTS_FILE
from searchr1_async.watch.dashboard import Choice
from searchr1_async.watch.viewer import CellView, load_tokenizer, remember_tokenizer, view_run

CELL_EPISODES = 200
"""Episodes in a notebook's inline viewer, all of which its file embeds."""


class RecordedRun:
    """A run, read from its folder. Every call reads the files again, so it also follows a run in another process."""

    def __init__(self, out_dir: str | Path) -> None:
        self._out_dir = absolute_path(out_dir, "out_dir")
        self._search: Search | None = None
        self._choice = ServiceChoice()
        self._tokenizer: Any = None

    @property
    def out_dir(self) -> Path:
        """The run's folder: settings, resume point, records, the embedded service's checkpoints."""
        return self._out_dir

    @property
    def done(self) -> bool:
        """No process is training in the folder."""
        return not is_claimed(self._out_dir)

    @property
    def step(self) -> int:
        """Optimiser steps finished."""
        point = ResumePoint.load(self._out_dir)
        return point.step if point else 0

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings as plain JSON values; empty before its first resume point."""
        point = ResumePoint.load(self._out_dir)
        return dict(point.settings) if point else {}

    @property
    def config(self) -> TrainConfig:
        """The run's settings as given and chosen, of its last session.

        Raises:
            ConfigurationError: the folder has none: the run has not started, or was started by an earlier version.
        """
        return TrainConfig.load(self._out_dir / CONFIG_FILE)

    @property
    def result(self) -> TrainingResult:
        """The result so far; its ``reason`` is ``"running"`` or ``"ended"``."""
        return result_of(self._out_dir, ResumePoint.load(self._out_dir), "ended" if self.done else "running")

    @property
    def checkpoints(self) -> tuple[KeptCheckpoint, ...]:
        """Weights kept for sampling, by step, with their scores on the held-out questions."""
        return kept_checkpoints(self._out_dir)

    @property
    def best(self) -> KeptCheckpoint | None:
        """The kept weights with the highest exact match on the held-out questions; None before the first evaluation.

        They are selected on those questions, which biases their score upwards: report them on other questions.
        """
        return best_checkpoint(self._out_dir)

    @property
    def metrics(self) -> pl.DataFrame:
        """One row per finished step, with the recipe's metric names as columns."""
        return RunRecords(self._out_dir).metrics()

    def episodes(self) -> pl.LazyFrame:
        """One row per episode of all finished steps, scanned from the run's Parquet files."""
        return RunRecords(self._out_dir).episodes()

    def groups(self) -> pl.LazyFrame:
        """One row per group of all finished steps: trained on, or why dropped; which weights sampled it."""
        return RunRecords(self._out_dir).groups()

    def evaluations(self) -> pl.LazyFrame:
        """One row per episode of all evaluations on the held-out questions; ``label`` names the evaluation."""
        return RunRecords(self._out_dir).evaluations()

    def episode(self, step: int, group: int = 0, member: int = 0) -> Episode:
        """One training episode, token by token, with rich display in a notebook.

        Args:
            step: optimiser step, from 1.
            group: number of the group in its step.
            member: number of the episode in its group, as in :meth:`episodes`.

        Raises:
            ConfigurationError: there is none.
        """
        found = RunRecords(self._out_dir).load_episode(step, group, member)
        if found is None:
            raise ConfigurationError(f"step {step} has no episode {member} of group {group}: run.episodes() lists all")
        # Loaded once: takes about a second.
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._out_dir)
        if self._tokenizer is not None:
            remember_tokenizer(self._tokenizer)
        return found

    @takes_config(AskConfig, emit="on_event")
    async def ask(
        self,
        question: str,
        search: Search | None = None,
        config: AskConfig | None = None,
        *,
        step: Step = "last",
        service: str | tinker.ServiceClient | None = None,
        progress: Choice = "quiet",
        on_event: Emit | None = None,
    ) -> Answer:
        """Asks the trained model one question; the answer has rich display in a notebook and when printed.

        Uses the prompt, format and limits of training. Writes nothing into the run's folder.

        A run of this process, paused or not, answers with its own service beside the training: for ``step="last"`` with its newest
        weights, which before the first step are untrained. This does not affect its records, episodes, samples or limits; searches
        with its own search count in its search metrics. If the run ends first, its last kept weights are asked.

        Args:
            search: the tool; None: the run's own.
            step: which kept weights: ``"last"``, ``"best"``, or a step's number (see :attr:`checkpoints`).
            config: its model and options of the embedded service are only for an ended run; None: the run's own, if this is its
                handle.
            service: only for an ended run; None likewise.

            The others as in :func:`searchr1_async.ask`.

        Raises:
            ConfigurationError, ServiceError, SearchError: as :func:`searchr1_async.ask`.
        """
        checked_arguments(RecordedRun.ask, locals())
        asked = asked_question(question)
        settings = config or AskConfig()

        async def put(answers: LiveAnswers) -> Answer:
            return await answers.answer(
                asked,
                settings.sampling,
                search=search,
                changes=settings.episode,
                weights=None if step == "last" else find_weights(self._out_dir, step),
            )

        if self._is_live:
            _refuse_other_service(settings, service)
            if (answer := await self._ask_live(put, progress, on_event)) is not None:
                return answer
        if settings.local == AskConfig().local:
            settings = settings.replace(local=self._choice.local)
        return await ask(
            question,
            search or self._search,
            settings.replace(tokenizer=settings.model.tokenizer or self._choice.tokenizer),
            checkpoint=self._out_dir,
            step=step,
            service=service or self._choice.service,
            progress=progress,
            on_event=on_event,
        )

    @property
    def _is_live(self) -> bool:
        """This is the handle of a run of this process."""
        return False

    async def _ask_live(
        self, put: Callable[[LiveAnswers], Awaitable[Answer]], progress: Choice, emit: Emit | None
    ) -> Answer | None:
        """Asks the running run; None if there is none, or if it ends before the answer."""
        return None

    def plot(self, kind: str = "learning", **options: Any) -> Any:
        """A chart of the run as an Altair object: modify it, or ``.save("chart.png")`` (or ``.svg``).

        Args:
            kind: ``"learning"``, ``"reward"``, ``"exact_match"``, ``"turns"``, ``"valid_calls"``, ``"timeline"`` (who waited for
                what in a step; ``step=``), ``"reward_by_turns"``, ``"suites"``, or the name of any metric.

        Raises:
            ConfigurationError: an unknown kind.
        """
        from searchr1_async.watch.charts import draw

        return draw(self._out_dir, kind, **options)

    def view(self, path: str | Path | None = None, **options: Any) -> Path | CellView:
        """The episode viewer: filter, sort, read and compare the run's episodes.

        Args:
            path: writes one self-contained HTML page there and returns its path. None: shown in the notebook cell, by default
                with 200 episodes from all steps and evaluations.
            options: ``steps``, ``labels`` and ``limit`` select the episodes.

        Raises:
            RunFolderError: nothing is recorded yet, or nothing matches.
        """
        if path is not None:
            return view_run(self._out_dir, path, **options)
        with tempfile.TemporaryDirectory(prefix="searchr1-view-") as scratch:
            options.setdefault("limit", CELL_EPISODES)
            page = view_run(self._out_dir, Path(scratch) / "view.html", **options)
            return CellView(page.read_text(encoding="utf-8"))

    async def export(self, folder: str | Path, **options: Any) -> Path:
        """Exports the run's weights from their service into a folder: a PEFT adapter, or merged weights.

        Args:
            folder: must not exist, or be empty.
            options: ``step``, ``format``, ``push_to_hub`` and the others of :func:`searchr1_async.export`, which also lists the
                errors.
        """
        return await export(self, folder, **options)

    def __repr__(self) -> str:
        state = "ended" if self.done else "running"
        return f"{type(self).__name__}({str(self._out_dir)!r}, {self.step} steps, {state})"


def _refuse_other_service(config: AskConfig, service: ServiceName) -> None:
    """Refuses what a running run cannot change: it answers with its own service and prompt."""
    usual, episode = AskConfig(), config.episode
    prompt = (episode.format, episode.renderer, episode.thinking, episode.instructions)
    if service is not None or (config.model, config.local) != (usual.model, usual.local) or prompt != (None,) * 4:
        raise ConfigurationError(
            "service, local, tokenizer, model and prompt are only for an ended run: this one answers with its own service"
        )


def recorded_run(path: Path) -> RecordedRun:
    """The run in a folder.

    Raises:
        RunFolderError: there is none.
    """
    if ResumePoint.load(path) is None and not is_claimed(path) and not (path / EVENTS_FILE).exists():
        raise RunFolderError(f"{path} holds no run: pass the out_dir of a run")
    return RecordedRun(path)
