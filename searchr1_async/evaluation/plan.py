"""A new evaluation: from a user's systems, suites and settings to its manifest.

Settings that the caller leaves open come from the runs' training, then from the defaults.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from searchr1_async.boundary.paths import FilePath, is_same_place
from searchr1_async.boundary.settings import Count, Natural, check_settings, settings_of
from searchr1_async.config import EpisodeLimits
from searchr1_async.data.suites import Suite, find_overlap
from searchr1_async.episodes.formats import SEARCH_TOOL, check_recipe
from searchr1_async.episodes.prompts import EXAMPLES, INSTRUCTIONS, WITHOUT_TOOL, Method, load_recipe_prompt
from searchr1_async.episodes.rewards import RecipeReward, RewardFunction
from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.episode_store import questions_digest, questions_frame
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.manifest import Manifest, SuiteRecord, SystemRecord
from searchr1_async.models import Thinking
from searchr1_async.runs.folder import kept_search, training_questions
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice
from searchr1_async.runs.run import RecordedRun
from searchr1_async.runs.weights import (
    EpisodeChoice,
    GivenWeights,
    Step,
    Weights,
    find_weights,
    kept_record,
    model_name,
    named_passages,
)
from searchr1_async.search.search import Search
from searchr1_async.service.connection import ServiceName, is_embedded, is_tinker_cloud
from searchr1_async.service.opening import default_model


@dataclass(frozen=True, slots=True)
class System:
    """Weights and how they are used.

    ``System()`` is the base model with the search tool, ``System(method="direct")`` the base model without it. Settings left at
    None come from the evaluation, then from the run's training.

    Raises:
        ConfigurationError: an unknown method.
    """

    checkpoint: GivenWeights | RecordedRun | None = None
    """A run, its folder, or a ``tinker://`` path; None is the base model."""
    step: Step = "last"
    """Which of a run's kept weights: ``"last"``, ``"best"`` on held-out questions, or an optimizer step."""
    model: str | None = None
    """Base model; None is that of the run or the evaluation."""
    method: Method = "search"
    """``search``, or a baseline: ``direct`` (no search), ``rag`` (one search with the question), ``recipe`` (the prompt of
    tinker-cookbook's recipe)."""
    format: str | None = None
    """Tool-call format."""
    renderer: str | None = None
    """Chat format."""
    thinking: Thinking = None
    instructions: str | None = None
    """System prompt; a baseline uses its method's."""
    limits: EpisodeLimits | None = None
    """Episode limits; prompts that ask for reasoning need higher ones."""
    n_results: Count | None = None
    """Passages per query; a number set on the search takes precedence over training."""
    max_passage_words: Natural | None = None
    """Words per passage, 0 for no limit; precedence as for ``n_results``."""
    service_folder: FilePath | None = None
    """The embedded service's folder with a ``tinker://`` checkpoint; not needed for a run."""

    def __post_init__(self) -> None:
        check_settings(self)


SystemSource = System | GivenWeights | RecordedRun | None
"""A system; or a run, its folder or a ``tinker://`` path, used with the search tool; None is the base model."""


class FoundSystem(NamedTuple):
    """A labelled system and its weights."""

    label: str
    system: System
    weights: Weights = Weights()


def find_systems(sources: Mapping[str, SystemSource], baselines: Sequence[Method] = ()) -> tuple[FoundSystem, ...]:
    """Finds the systems' weights; each baseline is a system called as its method.

    Raises ConfigurationError for bad labels or models, RunFolderError for bad folders.
    """
    if not sources:
        raise ConfigurationError("there is no system to evaluate: pass systems={label: run, …}, or omit systems")
    for method in baselines:
        if method in sources:
            raise ConfigurationError(f"a system and a baseline are both called {method!r}: rename the system")
    added = {method: System(method=method) for method in baselines}
    return tuple(_find(label, source) for label, source in (dict(sources) | added).items())


def _find(label: str, source: SystemSource) -> FoundSystem:
    if not isinstance(label, str) or not label.strip():
        raise ConfigurationError(f"a system's label is {label!r}: it must be non-blank text")
    system = source if isinstance(source, System) else System(checkpoint=source)
    assert not isinstance(system.checkpoint, RecordedRun), "System replaces a run by its folder"
    weights = find_weights(system.checkpoint, system.step, service_folder=system.service_folder)
    base = weights.base_model
    if system.model is not None and base is not None and not is_same_place(system.model, base):
        raise ConfigurationError(
            f"{label!r} was trained from {base} and cannot be evaluated as {system.model}: omit its model"
        )
    return FoundSystem(storable(label), system, weights)  # as in the episode files


def search_of_runs(systems: Sequence[FoundSystem]) -> Search | None:
    """The search that all runs were trained with, without its passage settings; None if there is no single one.

    Reads a whole corpus: call it in a worker thread. Raises ConfigurationError if the search differs from training, and the
    errors of :meth:`Search.from_description`.
    """
    runs = [each.weights.run for each in systems if each.weights.run is not None and each.system.method != "direct"]
    records = [(kept_record(run) or {}).get("description") for run in runs]
    described = [record and {k: v for k, v in record.items() if k not in _PASSAGES} for record in records]
    if not described or None in described or any(each != described[0] for each in described):
        return None
    kept_search(runs[0])  # raises if it differs from training
    return Search.from_description(described[0] or {})


_CHAT, _PASSAGES = ("renderer", "thinking"), ("n_results", "max_passage_words")
_FOLLOWED: dict[Method, tuple[str, ...]] = {
    "search": tuple(each.name for each in fields(EpisodeChoice)),
    "direct": (*_CHAT, "format"),
    "rag": (*_CHAT, "format", *_PASSAGES),
    "recipe": (*_CHAT, *_PASSAGES),
}
"""Settings of a run's training that a method follows. A baseline keeps its prompt and limits; the recipe's implies its format."""


@dataclass(frozen=True)
class NewEvaluation:
    """The validated arguments of a new evaluation."""

    suites: tuple[Suite, ...]
    systems: tuple[FoundSystem, ...]
    search: Search | None
    play: PlaySettings
    """``group_size`` is the number of samples per question. Episode settings are defaults behind ``asked`` and runs."""
    choice: ServiceChoice = field(default_factory=ServiceChoice)
    judge: Judge | None = None
    training_questions: tuple[Question, ...] = ()
    """Training questions in addition to those in the runs' folders."""
    asked: EpisodeChoice = field(default_factory=EpisodeChoice)

    def __post_init__(self) -> None:
        searching = [each.label for each in self.systems if each.system.method != "direct"]
        if self.search is None and searching:
            raise ConfigurationError(
                f"{', '.join(map(repr, searching))} needs a search: pass search to evaluate(), or --search"
            )
        for each in self.systems:
            episodes = replace(self.play, episodes=self.episodes_of(each)).episodes  # checked
            if each.system.method == "recipe":
                check_recipe(episodes.format_name, episodes.instructions)

    def episodes_of(self, each: FoundSystem) -> EpisodeChoice:
        """A system's episode settings. Precedence: system, caller, search, training, defaults."""
        system, asked, usual = each.system, self.asked, self.play.episodes
        if system.method != "search":  # instructions are for the search tool; baselines have their own
            asked, usual = replace(asked, instructions=None), replace(usual, instructions=None)
        own = settings_of(EpisodeChoice, asdict(system)).completed_by(EpisodeChoice.of_limits(system.limits))
        chosen = own.completed_by(asked).completed_by(named_passages(self.search))
        like = self.played_like(each)
        if like is not None and like.trained is not None:
            followed = {name: getattr(like.trained.episodes, name) for name in _FOLLOWED[system.method]}
            chosen = chosen.completed_by(EpisodeChoice(**followed))
        return chosen.completed_by(usual)

    def played_like(self, each: FoundSystem) -> Weights | None:
        """The run whose training settings a system uses: its own; for other systems, the runs of this evaluation if they agree.

        This separates what a run has learned from how it is prompted.
        """
        if each.weights.trained is not None:
            return each.weights
        runs = [other.weights for other in self.systems if other.weights.trained is not None]
        alike = len({repr(run.trained.episodes) for run in runs if run.trained is not None}) == 1
        return runs[0] if alike else None

    def model_of(self, each: FoundSystem) -> str | None:
        """Precedence: system, its run, evaluation, the first run; None if nobody names one."""
        runs = (other.weights.base_model for other in self.systems)
        known = (each.system.model, each.weights.base_model, self.choice.model, *runs)
        return model_name(next((model for model in known if model is not None), None), self.choice.service)


# --- the manifest -------------------------------------------------------------------------------------------------------


def describe(new: NewEvaluation) -> Manifest:
    """The manifest, but for the judge. Reads the whole corpus and the training questions: call it in a worker thread.

    Raises CorpusError.
    """
    play = new.play
    asked = [question for suite in new.suites for question in suite.questions]
    overlap = cache(lambda run: _overlap(new, run, asked))
    is_searched = new.search is not None and any(each.system.method != "direct" for each in new.systems)
    return Manifest(
        created="",
        versions={},
        service={},
        search=msgspec.to_builtins(new.search.record()) if new.search is not None and is_searched else None,
        settings={
            "samples": play.group_size,
            **{name: getattr(play.sampling, name) for name in ("temperature", "seed")},
            **{name: getattr(play.episodes, name) for name in ("format", "renderer", "thinking", "instructions")},
            "limits": asdict(play.limits),
            "reward": described_reward(play.reward),
            "max_failed_fraction": play.max_failed_fraction,
        },
        suites=tuple(map(_suite, new.suites)),
        systems=tuple(_system(new, each, overlap) for each in new.systems),
        questions_sha256=questions_digest(questions_frame(asked)),
    )


_PACKAGES = (
    "searchr1_async", "tinker", "tinker_cookbook", "renderers", "transformers", "torch", "chromadb", "google-genai", "polars",
)  # fmt: skip


def of_session(manifest: Manifest, service: ServiceName) -> Manifest:
    """A manifest with the date, package versions and service of this session."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    embedded = is_embedded(service)
    found = {
        "embedded": embedded,
        "tinker": not embedded and is_tinker_cloud(service),
        "host": urlsplit(service).hostname if isinstance(service, str) else None,
    }
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return replace(manifest, created=created, versions=versions, service=found, notes=())


def described_reward(reward: RewardFunction) -> dict[str, Any]:
    """A custom reward may contain anything, even secrets: only its name is recorded."""
    return {"kind": type(reward).__name__, **(asdict(reward) if isinstance(reward, RecipeReward) else {})}


def _suite(suite: Suite) -> SuiteRecord:
    # The same names as in questions.parquet.
    name, ids = storable(suite.name), tuple(storable(question.id) for question in suite.questions)
    return SuiteRecord(name, suite.source, suite.sha256, suite.total, suite.split, suite.limit, suite.seed, ids)


def _system(
    new: NewEvaluation, each: FoundSystem, overlap: Callable[[Path | None], Mapping[str, int] | None]
) -> SystemRecord:
    system, weights, usual, search = each.system, each.weights, new.play.episodes, new.search
    episodes, like = new.episodes_of(each), new.played_like(each)
    prompt, digest = prompt_of(episodes, system.method)
    words = (search.settings.max_passage_words or 0) if search else None
    return SystemRecord(
        label=each.label,
        method=system.method,
        model=new.model_of(each) or default_model(new.choice.service),
        checkpoint=weights.path,
        step=weights.step,
        run=_folder(weights.run),
        service_folder=_folder(system.service_folder),
        format=episodes.format_name,
        renderer=episodes.renderer,
        thinking=_other(episodes.thinking, usual.thinking),
        instructions=episodes.instructions,
        prompt=prompt,
        prompt_sha256=digest,
        limits=None if system.limits is None and episodes.limits == usual.limits else asdict(episodes.limits),
        n_results=_other(episodes.n_results, search.n_results if search else None),
        max_passage_words=_other(episodes.max_passage_words, words),
        like=None if like is None else _folder(like.run),
        differences=_differences(new, each, episodes),
        unrecorded=weights.trained.unrecorded if weights.trained else (),
        overlap=overlap(weights.run) if weights.path is not None else None,  # the base model was not trained
    )


def _differences(new: NewEvaluation, each: FoundSystem, episodes: EpisodeChoice) -> dict[str, Any] | None:
    """Settings that differ from the run's training; None for baselines and systems that are not a run."""
    trained, search = each.weights.trained, new.search
    if trained is None or each.system.method != "search":
        return None
    found = trained.differences(episodes)
    if search is not None and trained.search_fingerprint is not None:
        # Compared with the training's passage settings, so that only the index itself counts here.
        then = trained.episodes
        if search.fingerprint_of(then.n_results, then.max_passage_words) != trained.search_fingerprint:
            record = search.record()
            found["search"] = [trained.search_source or "another", f"{record['source']}, {record['embedder']}"]
    return msgspec.to_builtins(found)


def _other(value: Any, usual: Any) -> Any:
    return None if value == usual else value


def _folder(path: object) -> str | None:
    return None if path is None else str(path)


def prompt_of(episodes: EpisodeChoice, method: Method) -> tuple[str, str]:
    """The system prompt, and the SHA-256 of the prompt with the tool or the worked examples."""
    if method == "recipe":
        recipe = load_recipe_prompt()
        prompt, extra = recipe.instructions, recipe.tool
    else:
        prompt = episodes.instructions or INSTRUCTIONS[episodes.format_name, method]
        extra = [(asdict(asked), asdict(found)) for asked, found in EXAMPLES] if method in WITHOUT_TOOL else SEARCH_TOOL
    return prompt, hashlib.sha256(json.dumps([prompt, extra], sort_keys=True).encode()).hexdigest()


def _overlap(new: NewEvaluation, run: Path | None, asked: Sequence[Question]) -> Mapping[str, int] | None:
    """Per suite, the number of questions seen in training; None if the training questions are unknown."""
    trained = None if run is None else training_questions(run)
    if trained is None and not new.training_questions:
        return None
    found = find_overlap([*(trained or ()), *new.training_questions], asked)
    counts = Counter(found.select("suite", "question_id").unique()["suite"].to_list())
    return {storable(suite.name): counts[suite.name] for suite in new.suites}
