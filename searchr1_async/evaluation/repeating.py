"""An earlier evaluation, to be done once more: its manifest and its questions turned into a job."""

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
from searchr1_async.episodes.methods import Method
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.evaluation.asked import questions_digest, questions_of, read_questions
from searchr1_async.evaluation.job import EvaluationJob
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.manifest import MANIFEST_NAME, Manifest, SuiteRecord, SystemRecord
from searchr1_async.evaluation.report import Report
from searchr1_async.evaluation.systems import MeasuredSystem, System
from searchr1_async.playing import PlaySettings, ServiceChoice
from searchr1_async.search import Search
from searchr1_async.search.record import search_of
from searchr1_async.watch.rows import storable
from searchr1_async.weights import Weights


def repeats(source: object) -> bool:
    """Whether what is to be evaluated is an earlier evaluation."""
    if isinstance(source, Manifest | Report):
        return True
    if not isinstance(source, str | Path):
        return False
    path = absolute_path(source, "suites") if str(source).strip() else Path(source)
    return path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file()


_MAY_BE_GIVEN = frozenset(
    [
        *("suites", "search", "service", "local", "tokenizer", "out_dir", "resume", "reward"),
        *("max_episodes_in_flight", "workers", "sampling_deadline", "max_service_outage", "progress", "emit"),
    ]
)
"""Where and how a repetition is played, and what a manifest may not be able to describe."""


def refuse_besides(evaluate: Callable[..., object], given: Mapping[str, Any]) -> None:
    """Refuses what would change a repetition: the manifest says it, and what is given besides would be ignored.

    Args:
        evaluate: its signature has the defaults.
        given: the values of all of its parameters, by name.

    Raises:
        ConfigurationError: naming what is not at its default.
    """
    parameters = inspect.signature(evaluate).parameters
    changed = [
        name
        for name, parameter in parameters.items()
        if name not in _MAY_BE_GIVEN and not _is_default(given[name], parameter.default)
    ]
    if changed:
        raise ConfigurationError(
            f"an earlier evaluation is repeated as it was: leave {', '.join(changed)} out, or evaluate the suites anew"
        )


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(value) == default
    # A frame of training questions has no truth.
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
    """The job of an earlier evaluation. Synchronous: call it in a worker thread.

    Args:
        source: what :func:`repeats` says yes to.
        search: None is made as the manifest describes it.
        choice: the service; a model is taken from the manifest.
        sampling: how many at once, and where; temperature and seed are the manifest's.

    Raises:
        RunFolderError: there is no manifest, or its questions are not those that it was of.
        ConfigurationError: it needs a search, a reward or questions that it cannot describe, or they are not the ones it was of.
        QuestionsError: a suite's file is another now.
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
        follows_runs=settings.get("follows_runs", False),  # each system's own settings are written down
        choice=choice,
        out_dir=out_dir,
        resume=resume,
        judge=None if manifest.judge is None else Judge(**manifest.judge),
    )


def _found(source: object) -> tuple[Manifest, pl.DataFrame | None]:
    """The manifest, and its questions where they are kept with it."""
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
    """From the questions beside the manifest; without them from where they came."""
    if asked is None:
        return tuple(map(_loaded, manifest.suites))
    if questions_digest(asked) != manifest.questions_sha256:
        raise RunFolderError("the questions that lie beside the manifest are not those that its manifest is of")
    questions = questions_of(asked)
    return tuple(
        Suite(each.name, questions[each.name], each.source, each.sha256, each.total, each.split, each.limit, each.seed)
        for each in manifest.suites
    )


def _loaded(record: SuiteRecord) -> Suite:
    if record.source.partition("#")[0] == MEMORY:
        raise ConfigurationError(
            f"suite {record.name!r} was given in memory, and a manifest alone does not hold its questions: repeat the report, or "
            "the evaluation's folder"
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
        raise RunFolderError(f"suite {record.name!r} of {record.source} does not have the questions of the manifest")
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
        service_folder=record.service_folder,  # what was named: its own manifest must be the same
    )
    base = record.model if record.checkpoint is not None else None
    return MeasuredSystem(record.label, system, Weights(record.checkpoint, record.step, base, folder, run), record)


def _reward(record: Mapping[str, Any]) -> RewardFunction:
    values = dict(record)
    if values.pop("kind") != RecipeReward.__name__:
        raise ConfigurationError(f"the manifest cannot describe its reward ({record['kind']}): give reward=…")
    return RecipeReward(**{field.name: values[field.name] for field in fields(RecipeReward) if field.name in values})
