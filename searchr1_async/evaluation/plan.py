"""The inputs of an evaluation, its order of work, and the opening of its services.

What the caller leaves open is settled by an earlier session of the same folder, or else by the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anyio

from searchr1_async.data.suites import Suite
from searchr1_async.episodes.formats import check_recipe
from searchr1_async.episodes.rendering import AS_TEMPLATE, select_renderer
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.judge import FoundJudge, Judge, find_judge, open_judge
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.systems import MeasuredSystem
from searchr1_async.events import Emit, Notice
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice, check_prompt, opened_service, policy_of
from searchr1_async.runs.weights import EpisodeChoice, Weights, model_name, named_passages
from searchr1_async.search.search import Search
from searchr1_async.service.connection import Service, is_embedded
from searchr1_async.service.startup import check_service, choose_service_model, default_model, load_embedded_tokenizer


@dataclass(frozen=True)
class EvaluationJob:
    """The validated inputs of an evaluation."""

    suites: tuple[Suite, ...]
    systems: tuple[MeasuredSystem, ...]
    search: Search | None
    play: PlaySettings
    """``group_size`` is the number of samples per question. Episode settings are defaults behind ``asked`` and runs."""
    choice: ServiceChoice = field(default_factory=ServiceChoice)
    out_dir: Path | None = None
    """None keeps the episodes as long as the report exists."""
    resume: bool = False
    judge: Judge | None = None
    training_questions: tuple[Question, ...] = ()
    """Training questions in addition to those in the runs' folders."""
    asked: EpisodeChoice = field(default_factory=EpisodeChoice)
    follows_runs: bool = True
    """Unset settings follow the runs' training. False for evaluations started by older versions."""

    def __post_init__(self) -> None:
        searching = [each.label for each in self.systems if each.system.method != "direct"]
        if self.search is None and searching:
            raise ConfigurationError(f"{', '.join(map(repr, searching))} needs a search: pass search to evaluate()")
        for each in self.systems:
            play = self.settings_of(each)
            if each.system.method == "recipe":
                check_recipe(play.episodes.format_name, play.episodes.instructions)
        _ = self.found_judge  # raises if the judge is invalid
        if self.resume and self.out_dir is None:
            raise ConfigurationError("resume=True continues the evaluation in out_dir: pass out_dir")

    @cached_property
    def found_judge(self) -> FoundJudge | None:
        """The judge with its model and weights resolved."""
        if self.judge is None:
            return None
        models = {self.model_of(each) for each in self.systems}
        return find_judge(self.judge, models, is_embedded=is_embedded(self.choice.service))

    @property
    def used_search(self) -> Search | None:
        """The search; None if every system answers directly."""
        return self.search if any(each.system.method != "direct" for each in self.systems) else None

    @property
    def samples(self) -> int:
        """Episodes per question and system."""
        return self.play.group_size

    def settings_of(self, measured: MeasuredSystem) -> PlaySettings:
        """A system's episode settings. Precedence: system, caller, search, training, defaults."""
        asked, usual = self.asked, self.play.episodes
        if measured.system.method != "search":  # instructions are for the search tool; baselines have their own
            asked, usual = replace(asked, instructions=None), replace(usual, instructions=None)
        chosen = measured.named.completed_by(asked).completed_by(named_passages(self.search))
        if (like := self.played_like(measured)) is not None:
            chosen = chosen.completed_by(self._of_training(like, measured))
        return replace(self.play, episodes=chosen.completed_by(usual))

    def played_like(self, measured: MeasuredSystem) -> Weights | None:
        """The run whose training settings a system uses: its own; for other systems, the runs of this evaluation if they agree.

        This separates what a run has learned from how it is prompted.
        """
        if measured.weights.trained is not None:
            return measured.weights
        runs = [each.weights for each in self.systems if each.weights.trained is not None]
        alike = len({repr(run.trained.episodes) for run in runs if run.trained is not None}) == 1
        return runs[0] if alike and self.follows_runs else None

    def _of_training(self, like: Weights, measured: MeasuredSystem) -> EpisodeChoice:
        assert like.trained is not None
        episodes = like.trained.episodes
        if not self.follows_runs:
            return EpisodeChoice(thinking=episodes.thinking)
        if measured.system.method == "search":
            return episodes
        # A baseline keeps its method's prompt and limits; the recipe's prompt implies its format.
        chosen = EpisodeChoice(renderer=episodes.renderer, thinking=episodes.thinking)
        if measured.system.method != "recipe":
            chosen = replace(chosen, format=episodes.format)
        if measured.system.method != "direct":
            chosen = replace(chosen, n_results=episodes.n_results, max_passage_words=episodes.max_passage_words)
        return chosen

    def choice_of(self, measured: MeasuredSystem) -> ServiceChoice:
        # A run's base model takes precedence over the evaluation's model.
        known = (measured.system.model, measured.weights.base_model, self.choice.model, self._trained_model)
        model = next((model for model in known if model is not None), None)
        return replace(self.choice, model=model_name(model, self.choice.service))

    def model_of(self, measured: MeasuredSystem) -> str:
        return self.choice_of(measured).model or default_model(self.choice.service)

    @property
    def _trained_model(self) -> str | None:
        """The first run's base model, the default for systems that name none."""
        models = (each.weights.base_model for each in self.systems)
        return next((model for model in models if model is not None), None)


@dataclass(frozen=True, slots=True)
class ServiceStage:
    choice: ServiceChoice
    folder: Path | None
    """The embedded service's folder with their weights, if any."""
    systems: tuple[MeasuredSystem, ...]


def service_stages(job: EvaluationJob, systems: Sequence[MeasuredSystem]) -> list[ServiceStage]:
    """The services to open in sequence, each with its systems in input order.

    One per model and, if embedded, per folder of weights: an embedded service sees only its own folder, and two at once would
    compete for cores. A base model uses the service of the first weights trained from it.
    """
    stages: dict[tuple[str | None, Path | None], list[MeasuredSystem]] = {}
    has_folders = is_embedded(job.choice.service)
    for measured in sorted(systems, key=lambda each: each.weights.service_folder is None):
        model, folder = job.choice_of(measured).model, measured.weights.service_folder if has_folders else None
        key = (model, folder)
        if folder is None:
            key = next((other for other in stages if other[0] == model), key)
        stages.setdefault(key, []).append(measured)
    return [
        ServiceStage(replace(job.choice, model=model), folder, tuple(sorted(own, key=systems.index)))
        for (model, folder), own in stages.items()
    ]


OpenedStage = tuple[ServiceStage, Service | None]
"""A stage and its service; None for an embedded service, which starts when its stage runs."""


async def open_stages(
    job: EvaluationJob, stages: Sequence[ServiceStage], stack: AsyncExitStack, emit: Emit
) -> list[OpenedStage]:
    """Connects to the services and checks models, prompts, weights and the judge. Writes nothing.

    ``stack`` closes the services. Raises ConfigurationError or ServiceError if something is not available.
    """
    opened: list[OpenedStage] = []
    for stage in stages:
        if is_embedded(job.choice.service):
            await _check_embedded(job, stage)
            opened.append((stage, None))
            continue
        service = await stack.enter_async_context(opened_service(stage.choice, None, emit))
        await _check_prompts(job, stage, service.model_name, service.tokenizer)
        for weights in {each.weights.path: each.weights for each in stage.systems}.values():
            await policy_of(service, weights, job.play.sampling)
        if job.found_judge is not None:
            await open_judge(job.found_judge, service)
        opened.append((stage, service))
    return opened


async def _check_embedded(job: EvaluationJob, stage: ServiceStage) -> None:
    choice = stage.choice
    await check_service(choice.service, choice.model, choice.local)
    model = choice.model or default_model(choice.service)
    tokenizer = await load_embedded_tokenizer(model, choice.tokenizer)
    await _check_prompts(job, stage, model, tokenizer)
    if (found := job.found_judge) is None:
        return
    await anyio.to_thread.run_sync(select_renderer, model, tokenizer, found.judge.renderer)
    if found.weights.service_folder not in (None, stage.folder):
        raise ConfigurationError(
            f"an embedded service has the weights of one folder: the one of {stage.systems[0].label!r} lacks the judge's, "
            f"which are in {found.weights.service_folder}. Judge with the base model, or evaluate on a service that has both"
        )


async def _check_prompts(job: EvaluationJob, stage: ServiceStage, model: str, tokenizer: Any) -> None:
    for each in stage.systems:
        settings = job.settings_of(each)
        await anyio.to_thread.run_sync(check_prompt, each.label, model, tokenizer, settings, each.system.method)


async def settled(job: EvaluationJob, emit: Emit) -> EvaluationJob:
    """The job with its default model resolved: from the session being resumed, else from the service.

    Raises ServiceError, or ModelError if the service offers neither the default nor another model of its family.
    """
    earlier = None
    if job.resume and job.out_dir is not None:
        earlier = await anyio.to_thread.run_sync(Manifest.load, job.out_dir)
    if earlier is not None and "thinking" not in earlier.settings and job.play.episodes.thinking is None:
        # Started by an older version: keep the setting of its first episodes.
        job = replace(job, play=replace(job.play, episodes=replace(job.play.episodes, thinking=AS_TEMPLATE)))
    if earlier is not None and "follows_runs" not in earlier.settings:
        job = replace(job, follows_runs=False)
    unnamed = [each.label for each in job.systems if job.choice_of(each).model is None]
    if not unnamed or is_embedded(job.choice.service):
        return job
    then = {record.label: record.model for record in earlier.systems} if earlier is not None else {}
    model = then.get(unnamed[0])
    if model is None:
        model, note = await choose_service_model(job.choice.service, None)
        if note is not None:
            emit(Notice(note))
    return replace(job, choice=replace(job.choice, model=model))
