"""Resolves which weights a user means: a run's last, best or numbered ones, a ``tinker://`` path, or the base model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.learn.checkpoints import KeptCheckpoint, ResumePoint, best_checkpoint, kept_checkpoints
from searchr1_async.search import Search
from searchr1_async.trained import EpisodeChoice, TrainedPlay, kept_record, named_passages

Step = int | Literal["last", "best"]


def parse_step(text: str) -> Step | None:
    """A step as written on the command line or after a folder's ``@``; None if it is none."""
    if text == "last" or text == "best":
        return text
    return int(text) if text.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights to sample from, and where they are."""

    path: str | None = None
    """``tinker://`` path; None: the base model."""
    step: int | None = 0
    """Optimiser steps behind them; None if unknown."""
    base_model: str | None = None
    """Their base model; None if unknown."""
    service_folder: Path | None = None
    """Folder of the embedded service that holds them; None for another service, or if any will do."""
    run: Path | None = None
    """Folder of the run they come from."""
    trained: TrainedPlay | None = None
    """How that run rolls out episodes; None without a run's folder."""

    def episodes(self, given: EpisodeChoice, search: Search | None) -> EpisodeChoice:
        """Episode settings for these weights: as given, else as the search was created, else as the run was trained."""
        chosen = given.completed_by(named_passages(search))
        return chosen if self.trained is None else chosen.completed_by(self.trained.episodes)


def find_weights(
    checkpoint: str | Path | None, step: Step = "last", *, service_folder: str | Path | None = None
) -> Weights:
    """Finds weights to sample from. Reads only small files.

    Args:
        checkpoint: a run's folder, a ``tinker://…/sampler_weights/…`` path, or None for the base model.
        step: for a run: its last kept weights, the best on its held-out questions, or a step's number.
        service_folder: the embedded service's folder with a ``tinker://`` checkpoint; not needed for a run's folder.

    Raises:
        RunFolderError: the folder holds no run, or the run has not kept these weights.
    """
    folder = Path(service_folder) if service_folder is not None else None
    if checkpoint is None:
        return Weights(service_folder=folder)
    if isinstance(checkpoint, str) and checkpoint.startswith("tinker://"):
        return Weights(checkpoint, None, None, folder)
    run = Path(checkpoint)
    point, own = _opened(run)
    folder = folder or own
    trained = TrainedPlay.of(point.settings, _search_record(run))
    if step == "last":
        if point.sampler_path is None:
            raise RunFolderError(
                f"the run in {checkpoint} has kept no weights yet (it does after checkpoint_every steps, and at its end)"
            )
        return Weights(point.sampler_path, point.sampler_step or 0, point.base_model, folder, run, trained)
    kept = _kept(run, step)
    return Weights(kept.sampler_path, kept.step, point.base_model, folder, run, trained)


def find_state(source: str | Path, step: Step = "last", *, service_folder: str | Path | None = None) -> Weights:
    """Finds a training state, to export or to start another run from. Arguments and errors as in :func:`find_weights`.

    Args:
        source: a run's folder, or a ``tinker://…/weights/…`` path; a path of another kind is a :class:`ConfigurationError`.
        step: ``"last"`` is the resume point's if no weights are kept yet.
    """
    folder = Path(service_folder) if service_folder is not None else None
    if isinstance(source, str) and source.startswith("tinker://"):
        if source.removeprefix("tinker://").split("/")[1:2] != ["weights"]:
            raise ConfigurationError(
                f"{source} is no training state: pass a path like tinker://RUN/weights/NAME. Weights saved only for sampling "
                "cannot be loaded for training or exported."
            )
        return Weights(source, None, None, folder)
    run = Path(source)
    point, own = _opened(run)
    folder = folder or own
    # Not weights kept only for their evaluation: a running run deletes them afterwards.
    kept = [one for one in kept_checkpoints(run) if one.for_good]
    last = kept[-1] if kept and kept[-1].state_path else None
    found = last if step == "last" else _kept(run, step)
    if found is None:
        return Weights(point.state_path, point.step, point.base_model, folder, run)
    if found.state_path is None:
        raise RunFolderError(
            f"the run in {run} kept the weights of step {found.step} for sampling only, as earlier versions of this "
            f"package did. Its last state is available: step='last' (step {point.step}, {point.state_path})."
        )
    return Weights(found.state_path, found.step, point.base_model, folder, run)


def _opened(run: Path) -> tuple[ResumePoint, Path | None]:
    """A run's resume point, and its embedded service's folder, if any."""
    point = ResumePoint.load(run) if run.is_dir() else None
    if point is None:
        raise RunFolderError(f"{run} holds no run: pass a run's folder or a tinker:// path")
    own = run / "service"
    return point, own if own.is_dir() else None


def _kept(run: Path, step: Step) -> KeptCheckpoint:
    if step == "best":
        best = best_checkpoint(run)
        if best is None:
            raise RunFolderError(
                f"the run in {run} has no best weights: train(held_out=…, evaluate_every=…, keep_best=True) keeps them"
            )
        return best
    kept = {checkpoint.step: checkpoint for checkpoint in kept_checkpoints(run)}
    if step not in kept:
        there = ", ".join(map(str, sorted(kept))) or "none"
        raise RunFolderError(f"the run in {run} has kept no weights of step {step!r}; kept: {there}")
    return kept[int(step)]


def _search_record(run: Path) -> dict[str, Any] | None:
    """None also if unreadable: :func:`kept_search` raises once the search itself is needed."""
    try:
        return kept_record(run)
    except RunFolderError:
        return None
