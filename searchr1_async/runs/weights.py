"""Which weights a user means, and how their run rolled out its episodes, so that they are used elsewhere as in training.

Weights are a run's last, best or numbered ones, a ``tinker://`` path, or the base model's. The annotations at the end check the
arguments of the public functions that take them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from searchr1_async.boundary.paths import as_name_or_folder
from searchr1_async.boundary.settings import as_text, shown, shown_with_kind
from searchr1_async.config import EpisodeLimits, EpisodeSettings, as_weights
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.runs.checkpoints import KeptCheckpoint, ResumePoint, best_checkpoint, kept_checkpoints
from searchr1_async.search.search import Search
from searchr1_async.service.connection import ServiceName, is_embedded

TINKER_PATH = "tinker://"
"""Begins a checkpoint's path on a Tinker service."""
SEARCH_FILE = "search.json"
"""File in a run's folder that describes its search (:func:`~searchr1_async.search.record.record_of`)."""
_PASSAGES = ("n_results", "max_passage_words")
_LIMITS = tuple(field.name for field in fields(EpisodeLimits))


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeChoice(EpisodeSettings):
    """Settings of episodes and of the passages shown. None leaves a setting open."""

    n_results: int | None = None
    """Passages per query."""
    max_passage_words: int | None = None
    """Words after which a passage is cut; 0: never."""

    @classmethod
    def of_limits(cls, limits: EpisodeLimits | None) -> EpisodeChoice:
        """All of these limits; an open choice for None."""
        return cls() if limits is None else cls(**asdict(limits))

    def __str__(self) -> str:
        """The settings that differ from the recipe's: ``format='tags', max_turns=3``."""
        usual = {**asdict(RECIPE_EPISODES), "max_passage_words": 0}
        other = {name: value for name, value in asdict(self).items() if value is not None and value != usual[name]}
        return ", ".join(f"{name}={value!r}" for name, value in other.items())


RECIPE_EPISODES = EpisodeChoice.of_limits(EpisodeLimits()).completed_by(EpisodeChoice(format="hermes"))
"""The recipe's defaults."""


def named_passages(search: Search | None) -> EpisodeChoice:
    """Number and length of passages, where the search was created with explicit values."""
    if search is None:
        return EpisodeChoice()
    return _passages({name: getattr(search.settings, name) for name in _PASSAGES if name in search.named})


def shown_passages(search: Search) -> EpisodeChoice:
    """Number and length of passages of a search."""
    return _passages({name: getattr(search.settings, name) for name in _PASSAGES})


def _passages(settings: Mapping[str, Any]) -> EpisodeChoice:
    # A search uses None for whole passages.
    words = (settings["max_passage_words"] or 0) if "max_passage_words" in settings else None
    return EpisodeChoice(n_results=settings.get("n_results"), max_passage_words=words)


@dataclass(frozen=True, slots=True)
class TrainedPlay:
    """How a run rolls out episodes, without its episode time limit (which keeps batches short) and temperature (which every
    evaluation chooses)."""

    episodes: EpisodeChoice
    search_fingerprint: str | None = None
    search_source: str | None = None
    """Description of the search's source and embedder; None for runs of earlier versions."""
    unrecorded: tuple[str, ...] = ()
    """Settings missing in the folder, as in runs of earlier versions: they had the defaults."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], search: Mapping[str, Any] | None) -> TrainedPlay:
        """From the settings of a run's resume point and its search record (:func:`kept_record`)."""
        limits, search = settings.get("limits") or {}, search or {}
        known = {name: limits[name] for name in _LIMITS if name in limits and name != "max_seconds"}
        known |= {name: settings[name] for name in ("format", "renderer", "instructions") if name in settings}
        given = {"max_seconds", "thinking", *known, *(name for name in _PASSAGES if name in search)}
        thinking = settings.get("thinking", AS_TEMPLATE)  # older runs always followed the chat template
        return cls(
            EpisodeChoice(**known, thinking=thinking).completed_by(_passages(search)).completed_by(RECIPE_EPISODES),
            settings.get("search"),
            f"{search['source']}, {search['embedder']}" if search else None,
            tuple(each.name for each in fields(EpisodeChoice) if each.name not in given),
        )

    def differences(self, measured: EpisodeChoice) -> dict[str, list[Any]]:
        """Settings that differ from training, as ``[then, now]`` by name.

        Args:
            measured: leaves open only what has no default.
        """
        then, now = asdict(self.episodes), asdict(measured)
        known = [name for name in then if name not in ("max_seconds", *_PASSAGES, *self.unrecorded)]
        known += [name for name in _PASSAGES if name not in self.unrecorded and now[name] is not None]
        return {name: [then[name], now[name]] for name in known if then[name] != now[name]}


def described_differences(differences: Mapping[str, list[Any]]) -> str:
    """As text: ``max_tokens 64 (trained with 28)``."""
    return ", ".join(f"{name} {shown(now)} (trained with {shown(then)})" for name, (then, now) in differences.items())


def kept_record(folder: Path) -> dict[str, Any] | None:
    """The search record of the run in a folder (:func:`~searchr1_async.search.record.record_of`); None in runs of earlier versions.

    Raises :class:`RunFolderError` if it cannot be read.
    """
    path = folder / SEARCH_FILE
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read the search record {path}: {error}. Pass search=…") from error


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
    if isinstance(checkpoint, str) and checkpoint.startswith(TINKER_PATH):
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
    if isinstance(source, str) and source.startswith(TINKER_PATH):
        if source.removeprefix(TINKER_PATH).split("/")[1:2] != ["weights"]:
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


def as_search(name: str, value: Any) -> Search:
    """Checks that a value is a :class:`Search`."""
    if isinstance(value, Search):
        return value
    if inspect.iscoroutine(value):
        value.close()
        raise ConfigurationError(f"{name} is a coroutine: await it first, {name} = await Search.open(…)")
    example = repr(str(value)) if isinstance(value, str | Path) else "'atlas'"
    raise ConfigurationError(
        f"{name} is {shown_with_kind(value)}: pass a Search, such as Search.local({example}) or await Search.open({example})"
    )


GivenSearch = Annotated[Search, as_search]


GivenWeights = Annotated[str | Path, as_weights]


def model_name(model: str | Path | None, service: ServiceName) -> str | None:
    """A model's name; on the embedded service a folder becomes absolute, elsewhere it is refused."""
    if model is None or is_embedded(service):
        return None if model is None else as_name_or_folder("model", model)
    if not (text := as_text("model", model)).strip():
        raise ConfigurationError(f"model is {model!r}: pass a name, or leave it out")
    return text
