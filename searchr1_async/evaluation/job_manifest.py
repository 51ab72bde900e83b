"""Between an evaluation's job and its manifest: the manifest of a job, compared with an earlier session's; the job of a manifest."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.config import EpisodeLimits, EvalConfig, SamplingSettings
from searchr1_async.data.suites import MEMORY, Suite, find_overlap, load_suite
from searchr1_async.episodes.formats import SEARCH_TOOL
from searchr1_async.episodes.prompts import EXAMPLES, INSTRUCTIONS, WITHOUT_TOOL, Method, load_recipe_prompt
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.manifest import (
    Manifest,
    SuiteRecord,
    SystemRecord,
    asked_questions,
    questions_digest,
    questions_of,
    read_questions,
)
from searchr1_async.evaluation.plan import EvaluationJob
from searchr1_async.evaluation.report import Report
from searchr1_async.evaluation.systems import MeasuredSystem, System
from searchr1_async.runs.folder import MANIFEST_NAME, training_questions
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice
from searchr1_async.runs.weights import EpisodeChoice, Weights
from searchr1_async.search.record import record_of, search_of
from searchr1_async.search.search import Search
from searchr1_async.service.connection import is_embedded, is_tinker_cloud

_PACKAGES = (
    "searchr1_async", "tinker", "tinker_cookbook", "renderers", "transformers", "torch", "chromadb", "google-genai", "polars",
)  # fmt: skip
_NOT_COMPARED = ("created", "versions", "notes", "judge")
"""Fields that may differ between sessions; a different judge only judges again."""


def describe(job: EvaluationJob, questions: pl.DataFrame) -> Manifest:
    """The manifest of a job. Reads the whole corpus and the training questions: call it in a worker thread.

    Raises CorpusError, or ConfigurationError if the prompt of a repeated system has changed.
    """
    search, judge = job.used_search, job.found_judge
    return Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        service=_service(job),
        search=None if search is None else record_of(search),
        settings=_settings(job),
        suites=tuple(map(_suite, job.suites)),
        systems=_systems(job),
        questions_sha256=questions_digest(questions),
        judge=None if judge is None else _plain(judge.describe()),
    )


def refuse_changes(then: Manifest, now: Manifest, folder: Path, *, resume: bool) -> None:
    """Raises RunFolderError unless the evaluation in ``folder`` is this one and may be resumed; lists the changes."""
    if not resume:
        raise RunFolderError(
            f"{folder} already contains an evaluation: pass resume=True to continue it, or choose another out_dir"
        )
    before, after = (_compared(manifest) for manifest in (then, now))
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise RunFolderError(
            f"{folder} contains a different evaluation ({', '.join(changed)} differ): choose another out_dir, or resume with "
            "the original arguments"
        )


def continued(then: Manifest, now: Manifest) -> Manifest:
    """The original manifest with this session's judge, newly known training overlap, and a note on changed packages."""
    notes = list(then.notes)
    if then.versions != now.versions:
        names = sorted({*then.versions, *now.versions})
        changes = [
            f"{name} {now.versions.get(name, 'missing')} after {then.versions.get(name, 'missing')}"
            for name in names
            if then.versions.get(name) != now.versions.get(name)
        ]
        notes.append(f"Resumed with other package versions: {', '.join(changes)}.")
    systems = tuple(
        before if after.overlap is None else replace(before, overlap=after.overlap)
        for before, after in zip(then.systems, now.systems, strict=True)
    )
    return replace(then, judge=now.judge, systems=systems, notes=tuple(dict.fromkeys(notes)))


def _compared(manifest: Manifest) -> dict[str, Any]:
    values = _plain(asdict(manifest))
    values["settings"].setdefault("thinking", AS_TEMPLATE)  # older manifests lack it
    values["settings"].setdefault("follows_runs", False)  # older manifests lack it
    values["service"].pop("tinker", None)  # older manifests lack it
    for system in values["systems"]:
        for name in ("overlap", "like", "differences", "unrecorded"):
            del system[name]
    return {name: value for name, value in values.items() if name not in _NOT_COMPARED}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _service(job: EvaluationJob) -> dict[str, Any]:
    service = job.choice.service
    host = urlsplit(service).hostname if isinstance(service, str) else None
    embedded = is_embedded(service)
    return {"embedded": embedded, "tinker": not embedded and is_tinker_cloud(service), "host": host}


_SAMPLING, _EPISODES = ("temperature", "seed"), ("format", "renderer", "thinking", "instructions")
"""Settings that a manifest records under their own names."""


def _settings(job: EvaluationJob) -> dict[str, Any]:
    play = job.play
    reward = play.reward
    return _plain(
        {
            "samples": job.samples,
            **{name: getattr(play.sampling, name) for name in _SAMPLING},
            **{name: getattr(play.episodes, name) for name in _EPISODES},
            "limits": asdict(play.limits),
            # A custom reward may contain anything, even secrets: only its name is recorded.
            "reward": {"kind": type(reward).__name__, **(asdict(reward) if isinstance(reward, RecipeReward) else {})},
            "max_failed_fraction": play.max_failed_fraction,
            "follows_runs": job.follows_runs,
        }
    )


def _suite(suite: Suite) -> SuiteRecord:
    # The same names as in questions.parquet.
    name, ids = storable(suite.name), tuple(storable(question.id) for question in suite.questions)
    return SuiteRecord(name, suite.source, suite.sha256, suite.total, suite.split, suite.limit, suite.seed, ids)


def _systems(job: EvaluationJob) -> tuple[SystemRecord, ...]:
    asked = asked_questions(job.suites)
    known: dict[Path | None, Mapping[str, int] | None] = {}
    records = []
    for measured in job.systems:
        run = measured.weights.run
        if run not in known:
            known[run] = _overlap(job, run, asked)
        records.append(_system(job, measured, known[run]))
    return tuple(records)


def _system(job: EvaluationJob, measured: MeasuredSystem, overlap: Mapping[str, int] | None) -> SystemRecord:
    system, weights, play = measured.system, measured.weights, job.settings_of(measured)
    episodes = play.episodes
    prompt, digest = _prompt(episodes, system.method)
    like, differences = job.played_like(measured), _differences(job, measured, play)
    if (record := measured.record) is not None:
        differences = record.differences
        overlap = overlap if record.overlap is None else record.overlap
        if record.prompt_sha256 not in (None, digest):
            raise ConfigurationError(
                f"{measured.label!r} used a different prompt ({record.prompt!r}) than method {system.method!r} uses in the installed "
                "package versions: install the versions in the manifest, or start a new evaluation"
            )
    return SystemRecord(
        label=measured.label,
        method=system.method,
        model=job.model_of(measured),
        checkpoint=weights.path,
        step=weights.step,
        run=_folder(weights.run),
        service_folder=None if system.service_folder is None else str(system.service_folder),
        format=episodes.format_name,
        renderer=episodes.renderer,
        thinking=None if episodes.thinking == job.play.episodes.thinking else episodes.thinking,
        instructions=episodes.instructions,
        prompt=prompt,
        prompt_sha256=digest,
        limits=None if system.limits is None and play.limits == job.play.limits else _plain(asdict(play.limits)),
        n_results=_other(episodes.n_results, job.search.n_results if job.search else None),
        max_passage_words=_other(
            episodes.max_passage_words, (job.search.settings.max_passage_words or 0) if job.search else None
        ),
        like=_folder(like.run) if like is not None and job.follows_runs else record.like if record else None,
        differences=differences,
        unrecorded=weights.trained.unrecorded if weights.trained else record.unrecorded if record else (),
        overlap=overlap if weights.path is not None else None,  # the base model was not trained
    )


def _differences(job: EvaluationJob, measured: MeasuredSystem, play: PlaySettings) -> dict[str, Any] | None:
    """Settings that differ from the run's training; None for baselines and systems that are not a run."""
    trained = measured.weights.trained
    if trained is None or measured.system.method != "search":
        return None
    found = trained.differences(play.episodes)
    search = job.search
    if search is not None and trained.search_fingerprint is not None:
        # Compared with the training's passage settings, so that only the index itself counts here.
        then = trained.episodes
        if search.fingerprint_of(then.n_results, then.max_passage_words) != trained.search_fingerprint:
            record = record_of(search)
            found["search"] = [trained.search_source or "another", f"{record['source']}, {record['embedder']}"]
    return _plain(found)


def _other(value: Any, usual: Any) -> Any:
    return None if value == usual else value


def _folder(run: Path | None) -> str | None:
    return None if run is None else str(run)


def _prompt(episodes: EpisodeChoice, method: Method) -> tuple[str, str]:
    """The system prompt, and the SHA-256 of the prompt with the tool or the worked examples."""
    if method == "recipe":
        recipe = load_recipe_prompt()
        prompt, extra = recipe.instructions, recipe.tool
    else:
        prompt = episodes.instructions or INSTRUCTIONS[episodes.format_name, method]
        extra = [(asdict(asked), asdict(found)) for asked, found in EXAMPLES] if method in WITHOUT_TOOL else SEARCH_TOOL
    return prompt, hashlib.sha256(json.dumps([prompt, extra], sort_keys=True).encode()).hexdigest()


def _overlap(job: EvaluationJob, run: Path | None, asked: Sequence[Question]) -> Mapping[str, int] | None:
    """Per suite, the number of questions seen in training; None if the training questions are unknown."""
    trained = None if run is None else training_questions(run)
    if trained is None and not job.training_questions:
        return None
    found = find_overlap([*(trained or ()), *job.training_questions], asked)
    counts = Counter(found.select("suite", "question_id").unique()["suite"].to_list())
    return {storable(suite.name): counts[suite.name] for suite in job.suites}


def _plain(value: Any) -> Any:
    """As JSON round-trips it, so that a new manifest equals a loaded one."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, str | bool) else str(value)


def repeats(source: object) -> bool:
    """Whether ``source`` is an earlier evaluation rather than suites."""
    if isinstance(source, Manifest | Report):
        return True
    if not isinstance(source, str | Path):
        return False
    path = absolute_path(source, "suites") if str(source).strip() else Path(source)
    return path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file()


_ACCEPTED = ("suites", "search", "service", "out_dir", "resume", "reward", "progress", "on_event")
"""Arguments that a repetition accepts: they do not change what is measured, or a manifest may not describe them."""


def refuse_overrides(given: Mapping[str, Any], config: EvalConfig) -> None:
    """Raises ConfigurationError if arguments or settings that the manifest determines are given.

    ``given`` maps all parameter names of ``evaluate`` to values.
    """
    repeatable = {
        "local": config.local,
        "tokenizer": config.model.tokenizer,
        "max_service_outage": config.faults.max_service_outage,
        "max_episodes_in_flight": config.sampling.max_episodes_in_flight,
        "workers": config.sampling.workers,
        "first_turn": config.sampling.first_turn,
        "sampling_deadline": config.sampling.deadline,
    }
    usual = EvalConfig(**repeatable).flat()
    changed: list[str] = []
    for name, value in given.items():
        if name == "config":
            changed += [setting for setting, chosen in config.flat().items() if chosen != usual[setting]]
        # A frame of training questions has no truth value.
        elif name not in _ACCEPTED and value is not None and not (isinstance(value, list | tuple | dict) and not value):
            changed.append(name)
    if changed:
        raise ConfigurationError(
            f"an evaluation is repeated with its original settings: omit {', '.join(changed)}, or evaluate the suites anew"
        )


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
            sampling=replace(sampling, **{name: settings[name] for name in _SAMPLING}),
            # Older manifests lack thinking.
            episodes=EpisodeChoice(
                **{"thinking": AS_TEMPLATE} | {name: settings[name] for name in _EPISODES if name in settings},
                **settings["limits"],
            ),
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
