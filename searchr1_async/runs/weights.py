"""Which weights a user means, and how their run rolled out its episodes, so that they are used elsewhere as in training.

Weights are a run's last, best or numbered ones, a ``tinker://`` path, or the base model's. The annotations at the end check the
arguments of the public functions that take them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from searchr1_async.boundary.paths import as_name_or_folder
from searchr1_async.boundary.settings import check, shown, shown_with_kind
from searchr1_async.config import EpisodeLimits, EpisodeSettings, as_weights
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.runs.resume import KeptCheckpoint, ResumePoint, best_checkpoint, kept_checkpoints
from searchr1_async.search.search import Search
from searchr1_async.service.connection import ServiceName, is_embedded

TINKER_PATH = "tinker://"
"""Begins a checkpoint's path on a Tinker service."""
SEARCH_FILE = "search.json"
"""File in a run's folder that describes its search (:meth:`~searchr1_async.search.search.Search.record`)."""
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


RECIPE_EPISODES = EpisodeChoice.of_limits(EpisodeLimits()).completed_by(EpisodeChoice(format="hermes"))
"""The recipe's defaults."""


def named_passages(search: Search | None) -> EpisodeChoice:
    """Number and length of passages, where the search was created with explicit values."""
    return EpisodeChoice() if search is None else _passages(search, search.named)


def shown_passages(search: Search) -> EpisodeChoice:
    """Number and length of passages of a search."""
    return _passages(search, _PASSAGES)


def _passages(search: Search, names: Container[str]) -> EpisodeChoice:
    return _choice({name: getattr(search.settings, name) for name in _PASSAGES if name in names})


def _choice(passages: Mapping[str, Any]) -> EpisodeChoice:
    # A search uses None for whole passages.
    known: dict[str, Any] = {name: passages[name] or 0 for name in _PASSAGES if name in passages}
    return EpisodeChoice(**known)


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
            EpisodeChoice(**known, thinking=thinking).completed_by(_choice(search)).completed_by(RECIPE_EPISODES),
            settings.get("search"),
            f"{search['source']}, {search['embedder']}" if search else None,
            tuple(each.name for each in fields(EpisodeChoice) if each.name not in given),
        )

    def differences(self, measured: EpisodeChoice) -> dict[str, list[Any]]:
        """Settings that differ from training, as ``[then, now]`` by name."""
        then, now = asdict(self.episodes), asdict(measured)
        known = [name for name in then if name not in ("max_seconds", *_PASSAGES, *self.unrecorded)]
        known += [name for name in _PASSAGES if name not in self.unrecorded and now[name] is not None]
        return {name: [then[name], now[name]] for name in known if then[name] != now[name]}


def described_differences(differences: Mapping[str, list[Any]]) -> str:
    """As text: ``max_tokens 64 (trained with 28)``."""
    return ", ".join(f"{name} {shown(now)} (trained with {shown(then)})" for name, (then, now) in differences.items())


def kept_record(folder: Path) -> dict[str, Any] | None:
    """The search record of the run in a folder (:meth:`~searchr1_async.search.search.Search.record`); None in runs of earlier versions.

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
    """Optimizer steps behind them; None if unknown."""
    base_model: str | None = None
    """Their base model; None if unknown."""
    service_folder: Path | None = None
    """Folder of the embedded service that holds them; None for another service, or if any will do."""
    run: Path | None = None
    """Folder of the run they come from."""
    trained: TrainedPlay | None = None
    """How that run rolls out episodes; None without a run's folder."""

    @property
    def tokenizer(self) -> str | None:
        """Folder of the tokenizer that the run kept; None if there is none."""
        folder = None if self.run is None else self.run / "tokenizer"
        return str(folder) if folder is not None and folder.is_dir() else None

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
    """
    folder = None if service_folder is None else Path(service_folder)
    if checkpoint is None:
        return Weights(service_folder=folder)
    if isinstance(checkpoint, str) and checkpoint.startswith(TINKER_PATH):
        return Weights(checkpoint, None, service_folder=folder)
    run, point, folder = _opened(checkpoint, folder)
    trained = TrainedPlay.of(point.settings, _search_record(run))
    if step != "last":
        kept = _kept(run, step)
        return Weights(kept.sampler_path, kept.step, point.base_model, folder, run, trained)
    if point.sampler_path is None:
        raise RunFolderError(
            f"the run in {run} has kept no weights yet: it does after checkpoint_every steps and at its end"
        )
    return Weights(point.sampler_path, point.sampler_step or 0, point.base_model, folder, run, trained)


def find_state(source: str | Path, step: Step = "last", *, service_folder: str | Path | None = None) -> Weights:
    """Finds a training state, to export or to start another run from. Arguments and errors as in :func:`find_weights`.

    Args:
        source: a run's folder, or a ``tinker://…/weights/…`` path; a path of another kind is a :class:`ConfigurationError`.
        step: ``"last"`` is the resume point's if no weights are kept yet.
    """
    folder = None if service_folder is None else Path(service_folder)
    if isinstance(source, str) and source.startswith(TINKER_PATH):
        if source.removeprefix(TINKER_PATH).split("/")[1:2] != ["weights"]:
            raise ConfigurationError(
                f"{source} is no training state, only weights saved for sampling: pass a path like tinker://RUN/weights/NAME"
            )
        return Weights(source, None, service_folder=folder)
    run, point, folder = _opened(source, folder)
    if step != "last":
        found = _kept(run, step)
    else:
        # Not weights kept only for their evaluation: a running run deletes them afterwards.
        kept = [one for one in kept_checkpoints(run) if one.for_good]
        if not kept or kept[-1].state_path is None:
            return Weights(point.state_path, point.step, point.base_model, folder, run)
        found = kept[-1]
    if found.state_path is None:
        raise RunFolderError(
            f"the run in {run} kept the weights of step {found.step} for sampling only, as earlier versions of this package "
            f"did: step='last' has a state (of step {point.step})"
        )
    return Weights(found.state_path, found.step, point.base_model, folder, run)


def refuse_other_service(weights: Weights, service: ServiceName) -> None:
    """Raises :class:`RunFolderError` if a run's weights are on another kind of service than the one that would be opened."""
    is_local = weights.service_folder is not None
    if weights.run is None or is_embedded(service) == is_local or (is_local and service is not None):
        return
    where = (
        "in its folder, for the embedded service"
        if is_local
        else "not in its folder but on the service that trained it"
    )
    raise RunFolderError(
        f"the weights of {weights.run} are {where}: pass service=…, or {'unset' if is_local else 'set'} TINKER_API_KEY and "
        "TINKER_BASE_URL"
    )


def _opened(given: str | Path, service_folder: Path | None) -> tuple[Path, ResumePoint, Path | None]:
    """A run's folder, its resume point, and its embedded service's folder, if any."""
    run = Path(given)
    point = ResumePoint.load(run) if run.is_dir() else None
    if point is None:
        raise RunFolderError(f"{run} holds no run: pass a run's folder or a tinker:// path")
    own = run / "service"
    return run, point, service_folder or (own if own.is_dir() else None)


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
        value.close()  # of Search.open(…), not awaited
    raise ConfigurationError(
        f"{name} is {shown_with_kind(value)}: pass a Search, such as Search.local('atlas') or await Search.open('atlas')"
    )


GivenSearch = Annotated[Search, as_search]
GivenWeights = Annotated[str | Path, as_weights]


def model_name(model: str | Path | None, service: ServiceName) -> str | None:
    """A model's name; on the embedded service a folder becomes absolute, elsewhere it is refused."""
    if model is None or is_embedded(service):
        return None if model is None else as_name_or_folder("model", model)
    if not (text := check("model", model, str)).strip():
        raise ConfigurationError(f"model is {model!r}: pass a name, or leave it out")
    return text
