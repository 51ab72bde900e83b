"""Repeats an earlier evaluation: turns its manifest and questions into a job."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.data.suites import MEMORY, Suite, load_suite
from searchr1_async.episodes.prompts import Method
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.episodes.rewards import RecipeReward, RewardFunction
from searchr1_async.episodes.table import storable
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.evaluation.asked import questions_digest, questions_of, read_questions
from searchr1_async.evaluation.job import EvaluationJob
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.manifest import MANIFEST_NAME, Manifest, SuiteRecord, SystemRecord
from searchr1_async.evaluation.report import Report
from searchr1_async.evaluation.systems import MeasuredSystem, System
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice
from searchr1_async.runs.weights import Weights
from searchr1_async.search import Search
from searchr1_async.search.record import search_of


def repeats(source: object) -> bool:
    """Whether ``source`` is an earlier evaluation rather than suites."""
    if isinstance(source, Manifest | Report):
        return True
    if not isinstance(source, str | Path):
        return False
    path = absolute_path(source, "suites") if str(source).strip() else Path(source)
    return path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file()


_ACCEPTED = frozenset(
    [
        *("suites", "search", "service", "local", "tokenizer", "out_dir", "resume", "reward"),
        *("max_episodes_in_flight", "workers", "sampling_deadline", "max_service_outage", "progress", "emit"),
    ]
)
"""Arguments that a repetition accepts: they do not change what is measured, or a manifest may not describe them."""


def refuse_overrides(evaluate: Callable[..., object], given: Mapping[str, Any]) -> None:
    """Raises ConfigurationError if arguments that the manifest determines are not at ``evaluate``'s defaults.

    ``given`` maps all parameter names to values.
    """
    parameters = inspect.signature(evaluate).parameters
    changed = [
        name
        for name, parameter in parameters.items()
        if name not in _ACCEPTED and not _is_default(given[name], parameter.default)
    ]
    if changed:
        raise ConfigurationError(
            f"an evaluation is repeated with its original settings: omit {', '.join(changed)}, or evaluate the suites anew"
        )


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(value) == default
    # A frame of training questions has no truth value.
    return value is default or (isinstance(value, str | int | float) and value == default)


def repeated_job(
    source: object,
    search: Search | None,
    choice: ServiceChoice,
    sampling: SamplingSettings,
    *,
    out_dir: Path | None = None,
    resume: bool = False,
    reward: RewardFunction | None = None,
) -> EvaluationJob:
    """The job of an earlier evaluation. Blocking: call it in a worker thread.

    ``source`` is accepted by :func:`repeats`. Models, temperature and seed come from the manifest, as does the search if None.

    Raises:
        RunFolderError: there is no manifest, or its questions changed.
        ConfigurationError: the manifest cannot describe its search, reward or questions, or the given ones differ.
        QuestionsError: a suite's file changed.
    """
    manifest, asked = _found(source)
    settings = manifest.settings
    return EvaluationJob(
        suites=_suites(manifest, asked),
        systems=tuple(map(_measured, manifest.systems)),
        search=search if manifest.search is None else search_of(manifest.search, search, "the manifest"),
        play=PlaySettings(
            reward=reward or _reward(settings["reward"]),
            limits=EpisodeLimits(**settings["limits"]),
            sampling=replace(sampling, temperature=settings["temperature"], seed=settings["seed"]),
            format_name=settings["format"],
            renderer_name=settings["renderer"],
            thinking=settings.get("thinking", AS_TEMPLATE),
            instructions=settings["instructions"],
            group_size=settings["samples"],
            max_failed_fraction=settings["max_failed_fraction"],
        ),
        follows_runs=settings.get("follows_runs", False),  # the manifest has each system's own settings
        choice=choice,
        out_dir=out_dir,
        resume=resume,
        judge=None if manifest.judge is None else Judge(**manifest.judge),
    )


def _found(source: object) -> tuple[Manifest, pl.DataFrame | None]:
    """The manifest, and its questions if kept."""
    if isinstance(source, Report):
        if source.manifest is None:
            raise ConfigurationError("this report has no manifest: it was made of evaluations in memory")
        return source.manifest, source.load_questions() if source.load_questions is not None else None
    if isinstance(source, Manifest):
        return source, None
    path = absolute_path(cast(str, source), "suites")
    manifest = Manifest.load(path)
    if manifest is None:
        raise RunFolderError(f"there is no manifest {path}")
    return manifest, read_questions(path if path.is_dir() else path.parent)


def _suites(manifest: Manifest, asked: pl.DataFrame | None) -> tuple[Suite, ...]:
    """From the kept questions, else from the original sources."""
    if asked is None:
        return tuple(map(_loaded, manifest.suites))
    if questions_digest(asked) != manifest.questions_sha256:
        raise RunFolderError("the questions beside the manifest do not match it")
    questions = questions_of(asked)
    return tuple(
        Suite(each.name, questions[each.name], each.source, each.sha256, each.total, each.split, each.limit, each.seed)
        for each in manifest.suites
    )


def _loaded(record: SuiteRecord) -> Suite:
    if record.source.partition("#")[0] == MEMORY:
        raise ConfigurationError(
            f"suite {record.name!r} was given in memory and its questions are not in the manifest: repeat the report or the "
            "evaluation's folder instead"
        )
    suite = load_suite(
        record.source,
        name=record.name,
        split=record.split,
        limit=record.limit,
        seed=record.seed,
        sha256=record.sha256,
    )
    if tuple(storable(question.id) for question in suite.questions) != record.question_ids:
        raise RunFolderError(f"the questions of suite {record.name!r} from {record.source} do not match the manifest")
    return suite


def _measured(record: SystemRecord) -> MeasuredSystem:
    run = None if record.run is None else Path(record.run)
    inside = None if run is None or not (run / "service").is_dir() else run / "service"
    folder = inside if record.service_folder is None else Path(record.service_folder)
    system = System(
        checkpoint=record.checkpoint,
        model=record.model,
        method=cast(Method, record.method),
        format=record.format,
        renderer=record.renderer,
        thinking=record.thinking,
        instructions=record.instructions,
        limits=None if record.limits is None else EpisodeLimits(**record.limits),
        n_results=record.n_results,
        max_passage_words=record.max_passage_words,
        service_folder=record.service_folder,  # as originally given: the new manifest must be equal
    )
    base = record.model if record.checkpoint is not None else None
    return MeasuredSystem(record.label, system, Weights(record.checkpoint, record.step, base, folder, run), record)


def _reward(record: Mapping[str, Any]) -> RewardFunction:
    values = dict(record)
    if values.pop("kind") != RecipeReward.__name__:
        raise ConfigurationError(f"the manifest cannot describe its reward ({record['kind']}): pass reward=…")
    return RecipeReward(**{field.name: values[field.name] for field in fields(RecipeReward) if field.name in values})
