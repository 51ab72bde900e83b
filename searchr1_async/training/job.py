"""A training job: the config and the objects that a run is given, checked.

Of what is no setting (reward, questions, answers) it has digests, so that a resume says what changed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

from searchr1_async.config import (
    EpisodeLimits,
    LocalOptions,
    PipelineSettings,
    RunLearning,
    SamplingSettings,
    TrainConfig,
    WarmUp,
)
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.episodes.types import Question
from searchr1_async.errors import RunFolderError
from searchr1_async.models import Price, Thinking
from searchr1_async.runs.checkpoints import ResumePoint
from searchr1_async.runs.estimate import RunShape
from searchr1_async.search.search import Search
from searchr1_async.service.connection import ServiceName
from searchr1_async.training.admission import QuestionOrder
from searchr1_async.training.start import Start
from searchr1_async.training.warm_up import Demonstration

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_QUESTIONS = {
    "questions": "the texts of the training questions",
    "golden_answers": "the golden answers of the training questions",
}
_HELD_OUT = {"held_out": "the held-out questions", "held_out_answers": "the golden answers of the held-out questions"}


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
    changed = [words for name, words in _HELD_OUT.items() if _differs(then, now, name)]
    rewards = [record.get("reward") or {} for record in (then, now)]
    strict = [reward.get("strict_recipe") for reward in rewards]
    if None not in strict and strict[0] != strict[1]:
        changed.append(f"strict_recipe ({strict[0]} then, {strict[1]} now), which defines a correct answer")
    if changed:
        raise RunFolderError(
            f"this run already has evaluations on its held-out questions, and new ones would not be comparable: "
            f"{'; '.join(changed)} changed. Pass the original input, leave held_out out, or choose another out_dir."
        )


def changed_inputs(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Descriptions of inputs that changed since the previous session; an input recorded by only one of them is not compared."""
    changed = [f"{words} changed" for name, words in {**_QUESTIONS, **_HELD_OUT}.items() if _differs(then, now, name)]
    before, after = then.get("reward"), now.get("reward")
    if before is None or after is None or before == after:
        return changed
    if before["kind"] != after["kind"]:
        return [f"the reward is {after['kind']}, was {before['kind']}", *changed]
    if before.get("by") != after.get("by"):
        return changed
    if "source" in before:
        return [f"the source of the reward {after['kind']} changed", *changed]
    settings = [
        f"{name} is {after[name]!r}, was {before[name]!r}" for name in before if before[name] != after.get(name)
    ]
    return [*settings, *changed]


def _differs(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    return name in then and name in now and then[name] != now[name]


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


# --- functions --------------------------------------------------------------------------------------------------------


def _reward(reward: RewardFunction) -> dict[str, Any]:
    if isinstance(reward, RecipeReward) and type(reward) is RecipeReward:
        return {"kind": "RecipeReward", **asdict(reward)}
    parts = list(_parts(reward, set()))
    by = "source" if not any(isinstance(part, _Code) for part in parts) else f"code of {sys.version_info[:2]}"
    kind = getattr(reward, "__qualname__", None) or type(reward).__qualname__
    return {"kind": kind, "by": by, "source": _digest(parts)}


class _Code(tuple[Any, ...]):
    """Compiled code, used if there is no source; it differs between Python versions."""

    __slots__ = ()


def _parts(value: object, seen: set[int]) -> Iterator[object]:
    """What a callable's results depend on, as far as visible: its source, that of same-module functions it calls, its defaults,
    and plain values it holds."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        yield from _plain({"args": value.args, **value.keywords})
        yield from _parts(value.func, seen)
    elif isinstance(value, MethodType):
        yield from _parts(value.__func__, seen)
        yield from _parts(value.__self__, seen)
    elif isinstance(value, FunctionType):
        yield from _function(value, seen)
    elif callable(value) and not isinstance(value, type):
        yield from _plain(_attributes(value))
        yield _source(type(value)) or type(value).__qualname__
        for attribute in _attributes(value).values():
            if isinstance(attribute, FunctionType | MethodType | functools.partial):
                yield from _parts(attribute, seen)


def _function(function: FunctionType, seen: set[int]) -> Iterator[object]:
    wrapped = inspect.unwrap(function)
    if wrapped is not function:
        yield from _parts(wrapped, seen)
        return
    # A lambda's source lines are those of its whole statement.
    source = None if function.__name__ == "<lambda>" else _source(function)
    yield source or _Code(_code(function.__code__))
    yield from _plain({"defaults": function.__defaults__, "keyword defaults": function.__kwdefaults__})
    used = inspect.getclosurevars(function)
    yield from _plain(used.nonlocals)
    helpers = [*used.nonlocals.values(), *used.globals.values()]
    for helper in helpers:
        if isinstance(helper, FunctionType) and helper.__module__ == function.__module__:
            yield from _parts(helper, seen)


def _source(of: Callable[..., Any]) -> str | None:
    """Source without comments, docstrings and layout; None if unavailable."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(of)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _code(code: CodeType) -> Iterator[object]:
    yield from (code.co_code, code.co_names, code.co_varnames)
    for constant in code.co_consts:
        yield _Code(_code(constant)) if isinstance(constant, CodeType) else constant


def _attributes(value: object) -> dict[str, object]:
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _plain(values: Mapping[str, object]) -> Iterator[object]:
    """The values, by name, that have the same repr in every process."""
    for name in sorted(values):
        if _is_plain(values[name]):
            yield name, values[name]


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


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
            "limits": asdict(self.limits),
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
        thinking = self.thinking if "thinking" in point.settings else AS_TEMPLATE
        return replace(self, config=self.config.replace(model=self.model or point.base_model, thinking=thinking))

    @cached_property
    def learning(self) -> RunLearning:
        flat = self.config.flat()
        return RunLearning(**{each.name: flat[each.name] for each in fields(RunLearning)})

    @property
    def limits(self) -> EpisodeLimits:
        return self.config.episode.limits

    @property
    def sampling(self) -> SamplingSettings:
        return self.config.sampling

    @property
    def pipeline(self) -> PipelineSettings:
        return self.config.pipeline

    @property
    def warm_up(self) -> WarmUp | None:
        return self.config.warm_up

    @property
    def model(self) -> str | None:
        return self.config.model.name

    @property
    def tokenizer(self) -> str | None:
        return self.config.model.tokenizer

    @property
    def local(self) -> LocalOptions:
        return self.config.local

    @property
    def format_name(self) -> str:
        return self.config.episode.format_name

    @property
    def renderer_name(self) -> str | None:
        return self.config.episode.renderer

    @property
    def thinking(self) -> Thinking:
        return self.config.episode.thinking

    @property
    def instructions(self) -> str | None:
        return self.config.episode.instructions

    @property
    def held_out_samples(self) -> int:
        return self.config.evaluation.held_out_samples

    @property
    def evaluate_every(self) -> int | None:
        return self.config.evaluation.evaluate_every

    @property
    def keep_best(self) -> bool:
        return self.config.checkpoints.keep_best

    @property
    def time_limit(self) -> float | None:
        return self.config.length.time_limit

    @property
    def max_cost(self) -> float | None:
        return self.config.cost.max_cost

    @property
    def price(self) -> Price | None:
        return self.config.cost.price

    @property
    def max_service_outage(self) -> float:
        return self.config.faults.max_service_outage

    def total_steps(self, order: QuestionOrder) -> int:
        """Optimiser steps in total; for whole epochs an upper bound, since dropped groups may be replaced."""
        learning = self.learning
        if learning.steps is not None:
            return learning.steps
        return -(-learning.epochs * len(order) // learning.groups_per_batch)

    @property
    def shape(self) -> RunShape:
        """How much the run rolls out and trains."""
        return RunShape.of(
            self.config,
            questions=self.questions,
            held_out=self.held_out,
            search_results=self.search.n_results,
        )

    def is_over(self, point: ResumePoint, order: QuestionOrder) -> bool:
        """Whether a run at this point has no steps left."""
        if self.learning.steps is not None:
            return point.step >= self.learning.steps
        return point.next_place >= self.learning.epochs * len(order) and not point.open_places
