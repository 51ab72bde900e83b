"""What an evaluation is given, and the order in which it is done. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from searchr1_async.arguments import model_name
from searchr1_async.data.suites import Suite
from searchr1_async.endpoint import is_embedded
from searchr1_async.episodes.dialect import check_recipe
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.judging import FoundJudge, find_judge
from searchr1_async.evaluation.systems import MeasuredSystem
from searchr1_async.playing import PlaySettings, ServiceChoice
from searchr1_async.search import Search
from searchr1_async.service import default_model
from searchr1_async.trained import EpisodeChoice, named_passages
from searchr1_async.weights import Weights


@dataclass(frozen=True)
class EvaluationJob:
    """Everything an evaluation is given; checked already."""

    suites: tuple[Suite, ...]
    systems: tuple[MeasuredSystem, ...]
    search: Search | None
    play: PlaySettings
    """``group_size`` is the number of samples a question; how episodes are played is what neither ``asked`` nor a run tells."""
    choice: ServiceChoice = field(default_factory=ServiceChoice)
    out_dir: Path | None = None
    """None keeps the episodes as long as the report lives."""
    resume: bool = False
    judge: Judge | None = None
    training_questions: tuple[Question, ...] = ()
    """What the models were trained on, besides what their runs' folders tell."""
    asked: EpisodeChoice = field(default_factory=EpisodeChoice)
    """How episodes are to be played, as far as the caller says."""
    follows_runs: bool = True
    """What nobody says is as the systems' runs were trained. False of an evaluation that an earlier version began."""

    def __post_init__(self) -> None:
        searching = [each.label for each in self.systems if each.system.method != "direct"]
        if self.search is None and searching:
            raise ConfigurationError(f"{', '.join(map(repr, searching))} searches: give evaluate() a search")
        for each in self.systems:
            play = self.settings_of(each)
            if each.system.method == "recipe":
                check_recipe(play.format_name, play.instructions)
        _ = self.found_judge  # one that cannot be is refused here
        if self.resume and self.out_dir is None:
            raise ConfigurationError("resume=True goes on with what is in out_dir: name it")

    @cached_property
    def found_judge(self) -> FoundJudge | None:
        """Who judges, with the model and the weights that are meant."""
        if self.judge is None:
            return None
        held = {self.model_of(each) for each in self.systems}
        return find_judge(self.judge, held, is_embedded=is_embedded(self.choice.service))

    @property
    def used_search(self) -> Search | None:
        """The search; None where every system answers directly, whatever was given."""
        return self.search if any(each.system.method != "direct" for each in self.systems) else None

    @property
    def samples(self) -> int:
        """Episodes a question and system."""
        return self.play.group_size

    def settings_of(self, measured: MeasuredSystem) -> PlaySettings:
        """How a system's episodes are played: as it says, as the evaluation is asked for, as the search was made, as the run was
        trained, and else by the defaults."""
        asked, usual = self.asked, self.play.episodes
        if measured.system.method != "search":  # these are for the search tool; a baseline has its own
            asked, usual = replace(asked, instructions=None), replace(usual, instructions=None)
        chosen = measured.named.completed_by(asked).completed_by(named_passages(self.search))
        if (like := self.played_like(measured)) is not None:
            chosen = chosen.completed_by(self._of_training(like, measured))
        return replace(self.play, **chosen.completed_by(usual).play())

    def played_like(self, measured: MeasuredSystem) -> Weights | None:
        """The weights of the run whose settings a system is played with: its own, or of a system that is no run those beside it, where
        they were trained alike. So what a run has learned is told apart from how it was asked."""
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
        # A baseline's prompt is its method's, and needs its own room; that of the recipe is of one format.
        chosen = EpisodeChoice(renderer=episodes.renderer, thinking=episodes.thinking)
        if measured.system.method != "recipe":
            chosen = replace(chosen, format=episodes.format)
        if measured.system.method != "direct":
            chosen = replace(chosen, n_results=episodes.n_results, max_passage_words=episodes.max_passage_words)
        return chosen

    def choice_of(self, measured: MeasuredSystem) -> ServiceChoice:
        """The service and the model that it is measured on."""
        # What a run was trained from is a fact; the evaluation's model is for those that know of none.
        known = (measured.system.model, measured.weights.base_model, self.choice.model, self._trained_model)
        model = next((model for model in known if model is not None), None)
        return replace(self.choice, model=model_name(model, self.choice.service))

    def model_of(self, measured: MeasuredSystem) -> str:
        """The base model that it is measured on."""
        return self.choice_of(measured).model or default_model(self.choice.service)

    @property
    def _trained_model(self) -> str | None:
        """What runs among the systems were trained from: the base model that is meant where none is named."""
        models = (each.weights.base_model for each in self.systems)
        return next((model for model in models if model is not None), None)


@dataclass(frozen=True, slots=True)
class ServiceStage:
    """Systems that are measured over one service."""

    choice: ServiceChoice
    folder: Path | None
    """Of the embedded service, where one of them has its weights there."""
    systems: tuple[MeasuredSystem, ...]


def service_stages(job: EvaluationJob, systems: Sequence[MeasuredSystem]) -> list[ServiceStage]:
    """The services to open, one after the other, each with its systems in their order.

    One for each model and, embedded, each folder of weights: an embedded service knows its own folder alone, and two at once would
    share the machine's cores; any other has all weights, wherever a run of it has kept its files. A base model is measured over the service of the first weights that were trained from it.
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
