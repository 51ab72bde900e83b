"""A run as it lies in its folder: read, drawn and shown, whether it is running or has ended."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import polars as pl
import tinker

from searchr1_async.answer import Answer
from searchr1_async.answering import LiveAnswers, asked_question
from searchr1_async.asking import SAMPLING_DEADLINE, ask
from searchr1_async.boundary.paths import absolute_path
from searchr1_async.config import LocalOptions, SamplingSettings
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.events import Emit
from searchr1_async.exporting.export import export
from searchr1_async.job import TrainingResult
from searchr1_async.learn.checkpoints import KeptCheckpoint, ResumePoint, best_checkpoint, kept_checkpoints
from searchr1_async.playing import ServiceChoice
from searchr1_async.run_folder import is_claimed, result_of
from searchr1_async.search import Search
from searchr1_async.watch.dashboard import Choice
from searchr1_async.watch.records import RunRecords
from searchr1_async.watch.trackers import EVENTS_FILE
from searchr1_async.watch.viewer import CellView, load_tokenizer, remember_tokenizer, view_run
from searchr1_async.weights import Step, find_weights

CELL_EPISODES = 200
"""Episodes in a notebook's own viewer, which are kept in its file."""


class RecordedRun:
    """What a run's folder tells. Everything is read anew at each call, so it also follows a run that is under way elsewhere."""

    def __init__(self, out_dir: str | Path) -> None:
        self._out_dir = absolute_path(out_dir, "out_dir")
        self._search: Search | None = None
        self._choice = ServiceChoice()
        self._tokenizer: Any = None

    @property
    def out_dir(self) -> Path:
        """The run's folder: settings, resume point, records, checkpoints of the embedded service."""
        return self._out_dir

    @property
    def done(self) -> bool:
        """Nobody trains in the folder now."""
        return not is_claimed(self._out_dir)

    @property
    def step(self) -> int:
        """Optimiser steps finished."""
        point = ResumePoint.load(self._out_dir)
        return point.step if point else 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was given, as plain JSON values; empty before its first resume point."""
        point = ResumePoint.load(self._out_dir)
        return dict(point.settings) if point else {}

    @property
    def result(self) -> TrainingResult:
        """What the run has come to so far; its ``reason`` is ``"running"`` or ``"ended"``."""
        return result_of(self._out_dir, ResumePoint.load(self._out_dir), "ended" if self.done else "running")

    @property
    def checkpoints(self) -> tuple[KeptCheckpoint, ...]:
        """The weights that are kept for sampling, by step, with what they scored on the held-out questions."""
        return kept_checkpoints(self._out_dir)

    @property
    def best(self) -> KeptCheckpoint | None:
        """The kept weights with the highest exact match on the held-out questions; None where none were measured yet.

        Chosen *on* those questions, so their figure there is too high: measure them on others.
        """
        return best_checkpoint(self._out_dir)

    @property
    def metrics(self) -> pl.DataFrame:
        """One row a finished step, with the recipe's metric names as columns."""
        return RunRecords(self._out_dir).metrics()

    def episodes(self) -> pl.LazyFrame:
        """One row an episode of every finished step, scanned from the run's Parquet files."""
        return RunRecords(self._out_dir).episodes()

    def groups(self) -> pl.LazyFrame:
        """One row a group of every finished step: trained on, or dropped and why; the weights that it was sampled from."""
        return RunRecords(self._out_dir).groups()

    def evaluations(self) -> pl.LazyFrame:
        """One row an episode of every evaluation on the held-out questions, told apart by ``label``."""
        return RunRecords(self._out_dir).evaluations()

    def episode(self, step: int, group: int = 0, member: int = 0) -> Episode:
        """One episode of training, token for token; in a notebook it shows itself.

        Args:
            step: optimiser step, from 1.
            group: number of the group in its step, and
            member: of the episode in its group, as in :meth:`episodes`.

        Raises:
            ConfigurationError: there is none.
        """
        found = RunRecords(self._out_dir).load_episode(step, group, member)
        if found is None:
            raise ConfigurationError(
                f"step {step} has no episode {member} of group {group}: see run.episodes() for those that there are"
            )
        # Loaded once: it takes about a second.
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._out_dir)
        if self._tokenizer is not None:
            remember_tokenizer(self._tokenizer)
        return found

    async def ask(
        self,
        question: str,
        search: Search | None = None,
        *,
        step: Step = "last",
        temperature: float = 0.0,
        seed: int | None = None,
        max_turns: int | None = None,
        max_tokens: int | None = None,
        service: str | tinker.ServiceClient | None = None,
        local: LocalOptions | None = None,
        tokenizer: str | None = None,
        sampling_deadline: float = SAMPLING_DEADLINE,
        progress: Choice = "quiet",
        emit: Emit | None = None,
    ) -> Answer:
        """Asks the trained model one question; the answer shows itself in a notebook's cell, and printed in a terminal.

        It is asked as it was trained: the same prompt, format and limits. Nothing is written into the run's folder.

        A run under way in this process, held or not, answers with its own service beside the training, for ``step="last"`` with
        the newest weights; before its first step these are the untrained ones. Its records, episodes, samples and limits are left
        alone; searches with its own search are counted in its search figures. If it ends before the answer is there, its last
        kept weights are asked.

        Args:
            search: the tool; None is the run's own.
            step: which of the kept weights: ``"last"``, ``"best"``, or a number of steps (see :attr:`checkpoints`).
            service, local, tokenizer: only for a run that has ended; None is what the run was given, where this is its handle.

            The others as in :func:`searchr1_async.ask`.

        Raises:
            ConfigurationError, ServiceError, SearchError: as :func:`searchr1_async.ask`.
        """
        asked = asked_question(question)
        sampling = SamplingSettings(temperature=temperature, seed=seed, deadline=sampling_deadline)

        async def put(answers: LiveAnswers) -> Answer:
            return await answers.answer(
                asked,
                sampling,
                search=search,
                limits={"max_turns": max_turns, "max_tokens": max_tokens},
                weights=None if step == "last" else find_weights(self._out_dir, step),
            )

        if self._is_live:
            if (service, local, tokenizer) != (None, None, None):
                raise ConfigurationError(
                    "service, local and tokenizer are for a run that has ended: this one answers with its own service"
                )
            if (answer := await self._ask_live(put, progress, emit)) is not None:
                return answer
        return await ask(
            question,
            search or self._search,
            checkpoint=self._out_dir,
            step=step,
            temperature=temperature,
            seed=seed,
            max_turns=max_turns,
            max_tokens=max_tokens,
            service=service or self._choice.service,
            local=local or self._choice.local,
            tokenizer=tokenizer or self._choice.tokenizer,
            sampling_deadline=sampling_deadline,
            progress=progress,
            emit=emit,
        )

    @property
    def _is_live(self) -> bool:
        """This is the handle of a run that this process trains."""
        return False

    async def _ask_live(
        self, put: Callable[[LiveAnswers], Awaitable[Answer]], progress: Choice, emit: Emit | None
    ) -> Answer | None:
        """Asks the run under way; None where there is none, or where it ends before the answer is there."""
        return None

    def plot(self, kind: str = "learning", **options: Any) -> Any:
        """A chart of the run, as an Altair object: change it further, or ``.save("chart.png")`` (or ``.svg``).

        Args:
            kind: ``"learning"``, ``"reward"``, ``"exact_match"``, ``"turns"``, ``"valid_calls"``, ``"timeline"`` (who waited for
                what in a step; ``step=``), ``"reward_by_turns"``, ``"suites"``, or the name of any metric.

        Raises:
            ConfigurationError: an unknown kind.
        """
        from searchr1_async.watch.plots import draw  # altair: half a second, for those who draw

        return draw(self._out_dir, kind, **options)

    def view(self, path: str | Path | None = None, **options: Any) -> Path | CellView:
        """The episode viewer: filter, sort, read and compare the run's episodes.

        Args:
            path: writes one self-contained HTML page there and returns its path; None shows it in the notebook's cell, by default
                with 200 episodes, a share of every step and evaluation.
            options: ``steps``, ``labels`` and ``limit`` choose the episodes.

        Raises:
            RunFolderError: nothing is recorded yet, or not what is asked for.
        """
        if path is not None:
            return view_run(self._out_dir, path, **options)
        with tempfile.TemporaryDirectory(prefix="searchr1-view-") as scratch:
            options.setdefault("limit", CELL_EPISODES)
            page = view_run(self._out_dir, Path(scratch) / "view.html", **options)
            return CellView(page.read_text(encoding="utf-8"))

    async def export(self, folder: str | Path, **options: Any) -> Path:
        """Takes the run's weights out of their service into a folder: a PEFT adapter, or merged weights.

        Args:
            folder: must not exist, or be empty.
            options: ``step``, ``format``, ``push_to_hub`` and the others of :func:`searchr1_async.export`, which also says what it
                raises.
        """
        return await export(self, folder, **options)

    def __repr__(self) -> str:
        state = "ended" if self.done else "running"
        return f"{type(self).__name__}({str(self._out_dir)!r}, {self.step} steps, {state})"


def recorded_run(path: Path) -> RecordedRun:
    """The run in a folder.

    Raises:
        RunFolderError: there is none.
    """
    if ResumePoint.load(path) is None and not is_claimed(path) and not (path / EVENTS_FILE).exists():
        raise RunFolderError(f"{path} holds no run: name the out_dir that a run was given")
    return RecordedRun(path)
