"""A training job: the config and the objects that a run is given, complete and checked before anything starts or is written.

No training question may be held out. Of what is no setting (reward, questions, answers) a job has digests, so that a resume says what
changed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from searchr1_async.billing import check_max_cost
from searchr1_async.boundary.settings import settings_of, shown
from searchr1_async.config import RunLearning, TrainConfig, chosen_sizes
from searchr1_async.data.questions import load_questions, optional_questions
from searchr1_async.data.suites import find_overlap
from searchr1_async.episodes.formats import check_format
from searchr1_async.episodes.rendering import AS_TEMPLATE, check_thinking
from searchr1_async.episodes.rewards import RecipeReward, RewardFunction
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.runs.folder import find_point
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.runs.rollouts import ServiceChoice
from searchr1_async.runs.weights import model_name
from searchr1_async.search.search import Search
from searchr1_async.service.connection import ServiceName, is_embedded
from searchr1_async.service.opening import billing_on
from searchr1_async.training.admission import QuestionOrder
from searchr1_async.training.estimate import RunShape
from searchr1_async.training.initial_weights import (
    Demonstration,
    Start,
    chosen_model,
    chosen_rank,
    find_start,
    resumed_start,
)

_INPUTS = {
    "questions": "the texts of the training questions",
    "golden_answers": "the golden answers of the training questions",
    "held_out": "the held-out questions",
    "held_out_answers": "the golden answers of the held-out questions",
}


@dataclass(frozen=True)
class TrainingJob:
    """A run's settings, complete and checked, and the objects that it was given."""

    config: TrainConfig
    """With model, rank and all sizes chosen."""
    questions: tuple[Question, ...]
    search: Search
    out_dir: Path
    reward: RewardFunction
    service: ServiceName = None
    held_out: tuple[Question, ...] = ()
    demonstrations: tuple[Demonstration, ...] = ()
    resume: bool = False
    start: Start | None = None
    notes: tuple[str, ...] = ()
    """Notices about the settings, emitted at the start."""

    def identity(self) -> dict[str, Any]:
        """The settings a resume must not change, as plain JSON values: not the run's length or reporting intervals."""
        config = self.config
        learning = asdict(config.learning) | asdict(config.batch) | {"seed": config.seed}
        del learning["start_from"], learning["training_deadline"]
        return {
            **({"start_from": self.start.name} if self.start is not None else {}),
            "model": config.model.name,
            **{name: getattr(config.episode, name) for name in ("format", "renderer", "thinking", "instructions")},
            "temperature": config.sampling.temperature,
            "search": self.search.fingerprint,
            "limits": asdict(config.episode.limits),
            "learning": learning,
            "pipeline": asdict(config.pipeline),
            "warm_up": asdict(config.warm_up) if config.warm_up else None,
            # Compared separately: see :func:`changed_inputs`.
            "inputs": inputs_of(self.reward, self.questions, self.held_out),
        }

    def resumed(self, point: ResumePoint | None) -> TrainingJob:
        """The job with the resumed run's model and thinking, even if they were defaults then."""
        if point is None:
            return self
        config = self.config
        thinking = config.episode.thinking if "thinking" in point.settings else AS_TEMPLATE
        return replace(self, config=config.replace(model=config.model.name or point.base_model, thinking=thinking))

    @cached_property
    def learning(self) -> RunLearning:
        return RunLearning.of(self.config)

    @property
    def service_choice(self) -> ServiceChoice:
        config = self.config
        return ServiceChoice(
            self.service, config.model.name, config.local, config.model.tokenizer, config.faults.max_service_outage
        )

    @property
    def shape(self) -> RunShape:
        """How much the run rolls out and trains."""
        return RunShape(self.config, self.questions, self.held_out, self.search.n_results)

    def is_over(self, point: ResumePoint, order: QuestionOrder) -> bool:
        """Whether a run at this point has no steps left."""
        if self.learning.steps is not None:
            return point.step >= self.learning.steps
        return point.next_place >= self.learning.epochs * len(order) and not point.open_places


def training_job(given: Mapping[str, Any]) -> TrainingJob:
    """The job of a run, from the arguments of :func:`searchr1_async.train`, each already checked on its own.

    Reads the questions and small files of the given folders. Refuses contradictory arguments, and folders, runs or questions
    that cannot be used.
    """
    config: TrainConfig = given["config"] or TrainConfig()
    service, out_dir = given["service"], given["out_dir"]
    point = ResumePoint.load(out_dir) if given["resume"] else None
    questions = load_questions(given["questions"])
    is_local = is_embedded(service)
    sizes = chosen_sizes(
        config.flat(), questions=len(questions), is_embedded=is_local, begun=None if point is None else point.settings
    )
    notes: tuple[str, ...] = ()
    if point is None and is_local and config.batch.groups_per_batch is None:
        notes = (f"the embedded service runs on this machine: sizes you do not set are a laptop's ({sizes})",)
    config = config.replace(**asdict(sizes), format=config.episode.format_name)
    _ = config.episode.limits  # checks them together
    check_format(config.episode.format_name)
    model = model_name(config.model.name, service)
    check_thinking(model, config.episode.renderer, config.episode.thinking)
    held_out = optional_questions(given["held_out"])
    if config.evaluation.evaluate_every is not None and not held_out:
        raise ConfigurationError("evaluate_every needs held_out questions to evaluate on")
    start = None
    if (start_from := config.learning.start_from) is not None:
        start = find_start(start_from, service, out_dir) if point is None else resumed_start(start_from, point)
    model = chosen_model(model, start)
    check_max_cost(config.cost.max_cost, billing_on(service, model, config.cost.price))
    job = settings_of(
        TrainingJob,
        given,
        config=config.replace(model=model, lora_rank=chosen_rank(config.learning.lora_rank, start)),
        questions=questions,
        reward=given["reward"] or settings_of(RecipeReward, config.flat()),
        held_out=held_out,
        start=start,
        notes=notes,
    )
    refuse_overlap(job.questions, job.held_out)
    find_point(out_dir, resume=job.resume)  # refuses a folder with a run that is not to be resumed
    return job


def refuse_overlap(training: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Refuses held-out questions that are also trained on."""
    seen = find_overlap(training, held_out) if held_out else None
    if seen is not None and seen.height:
        first = seen.row(0, named=True)
        raise ConfigurationError(
            f"{seen.height} of {len(held_out)} held-out questions are also trained on; the first: "
            f"{shown(first['question'])} (held out as {shown(first['question_id'])}, trained on as "
            f"{shown(first['training_id'])}). Remove them from one of the two."
        )


def inputs_of(reward: RewardFunction, questions: Sequence[Question], held_out: Sequence[Question]) -> dict[str, Any]:
    """The record of a run's inputs, as plain JSON values; held-out questions only if there are any."""
    out = {
        "reward": _reward(reward),
        "questions": _digest((one.id, one.question) for one in questions),
        "golden_answers": _digest((one.id, one.golden_answers) for one in questions),
    }
    if held_out:
        out["held_out"] = _digest((one.id, one.question) for one in held_out)
        out["held_out_answers"] = _digest((one.id, one.golden_answers) for one in held_out)
    return out


def refuse_other_measure(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses changed inputs that would make a run's evaluations before and after a resume incomparable.

    ``then`` is the record of the previous, evaluated session; empty from earlier versions of the package.
    """
    changed = _changed(then, now, ("held_out", "held_out_answers"))
    strict = [(record.get("reward") or {}).get("strict_recipe") for record in (then, now)]
    if None not in strict and strict[0] != strict[1]:
        changed.append("strict_recipe, which defines a correct answer, changed")
    if changed:
        raise RunFolderError(
            f"this run already has evaluations on its held-out questions, and new ones would not be comparable: "
            f"{'; '.join(changed)}. Pass the original input, leave held_out out, or choose another out_dir."
        )


def changed_inputs(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Descriptions of inputs that changed since the previous session; an input recorded by only one of them is not compared."""
    before, after = then.get("reward") or {}, now.get("reward") or {}
    names = ["kind"] if before.get("kind") != after.get("kind") else list(before)
    differ = [name for name in names if name in before and name in after and before[name] != after[name]]
    changed = [f"{name} of the reward is {after[name]!r}, was {before[name]!r}" for name in differ]
    return changed + _changed(then, now, _INPUTS)


def _changed(then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [f"{_INPUTS[name]} changed" for name in names if name in then and name in now and then[name] != now[name]]


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _reward(reward: RewardFunction) -> dict[str, Any]:
    """The name of a reward, and the settings of the recipe's or the digest of another's source, if there is one."""
    if isinstance(reward, RecipeReward) and type(reward) is RecipeReward:
        return {"kind": "RecipeReward", **asdict(reward)}
    kind = getattr(reward, "__qualname__", None) or type(reward).__qualname__
    if kind.endswith("<lambda>"):  # its source lines are those of its whole statement, such as the call of train()
        return {"kind": kind}
    try:
        source = inspect.getsource(reward if inspect.isroutine(reward) else type(reward))
    except (OSError, TypeError):  # typed into an interpreter, or compiled
        return {"kind": kind}
    return {"kind": kind, "source_text": _digest([source])}
