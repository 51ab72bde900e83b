"""A training job's input and result.

Digests of a run's inputs besides its settings (reward, questions, answers), so a resume can report changes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

from searchr1_async.billing import Cost
from searchr1_async.config import (
    MAX_SERVICE_OUTAGE,
    EpisodeLimits,
    LearningSettings,
    LocalOptions,
    PipelineSettings,
    SamplingSettings,
    WarmUp,
)
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.episodes.types import Question
from searchr1_async.errors import RunFolderError
from searchr1_async.models import Price, Thinking
from searchr1_async.runs.checkpoints import KeptCheckpoint, ResumePoint
from searchr1_async.runs.estimate import CostEstimate, RunShape, mean_letters
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.search.search import Search
from searchr1_async.service.connection import ServiceName
from searchr1_async.training.admission import QuestionOrder
from searchr1_async.training.demonstrations import Demonstration
from searchr1_async.training.start import Start

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
        for held in _attributes(value).values():
            if isinstance(held, FunctionType | MethodType | functools.partial):
                yield from _parts(held, seen)


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
    """All validated settings of a run."""

    questions: tuple[Question, ...]
    search: Search
    out_dir: Path
    learning: LearningSettings
    pipeline: PipelineSettings
    limits: EpisodeLimits
    sampling: SamplingSettings
    reward: RewardFunction
    model: str | None = None
    service: ServiceName = None
    local: LocalOptions = field(default_factory=LocalOptions)
    tokenizer: str | None = None
    format_name: str = "hermes"
    renderer_name: str | None = None
    thinking: Thinking = None
    instructions: str | None = None
    warm_up: WarmUp | None = None
    demonstrations: tuple[Demonstration, ...] = ()
    held_out: tuple[Question, ...] = ()
    held_out_samples: int = 1
    evaluate_every: int | None = None
    keep_best: bool = False
    resume: bool = False
    time_limit: float | None = None
    max_cost: float | None = None
    price: Price | None = None
    start: Start | None = None
    max_service_outage: float = MAX_SERVICE_OUTAGE
    notes: tuple[str, ...] = ()
    """Notices about the settings, emitted at the start."""

    def identity(self) -> dict[str, Any]:
        """The settings a resume must not change, as plain JSON values: not the run's length or reporting intervals."""
        learning = asdict(self.learning)
        for name in ("steps", "epochs", "checkpoint_every", "max_failed_fraction", "training_deadline"):
            del learning[name]
        return {
            **({"start_from": self.start.name} if self.start is not None else {}),
            "model": self.model,
            "format": self.format_name,
            "renderer": self.renderer_name,
            "thinking": self.thinking,
            "instructions": self.instructions,
            "temperature": self.sampling.temperature,
            "search": self.search.fingerprint,
            "limits": asdict(self.limits),
            "learning": {**learning, "loss_config": dict(self.learning.loss_config)},
            "pipeline": asdict(self.pipeline),
            "warm_up": asdict(self.warm_up) if self.warm_up else None,
            # Compared separately: see :mod:`searchr1_async.training.job`.
            "inputs": inputs_of(self.reward, self.questions, self.held_out),
        }

    def total_steps(self, order: QuestionOrder) -> int:
        """Optimiser steps in total; for whole epochs an upper bound, since dropped groups may be replaced."""
        learning = self.learning
        if learning.steps is not None:
            return learning.steps
        return -(-learning.epochs * len(order) // learning.groups_per_batch)

    @property
    def shape(self) -> RunShape:
        """How much the run rolls out and trains."""
        learning = self.learning
        return RunShape(
            questions=len(self.questions),
            question_letters=mean_letters(self.questions),
            group_size=learning.group_size,
            groups_per_batch=learning.groups_per_batch,
            steps=learning.steps,
            epochs=learning.epochs,
            limits=self.limits,
            format_name=self.format_name,
            search_results=self.search.n_results,
            held_out=len(self.held_out),
            held_out_samples=self.held_out_samples,
            evaluate_every=self.evaluate_every,
            warm_up=self.warm_up,
            has_penalty=learning.kl_coefficient > 0,
        )

    def is_over(self, point: ResumePoint, order: QuestionOrder) -> bool:
        """Whether a run at this point has no steps left."""
        if self.learning.steps is not None:
            return point.step >= self.learning.steps
        return point.next_place >= self.learning.epochs * len(order) and not point.open_places


@dataclass(frozen=True)
class TrainingResult:
    """Result of a run. All of it can be read back from ``out_dir``."""

    out_dir: Path
    steps: int
    """Optimiser steps finished, earlier sessions of the run included."""
    reason: str
    """``finished``, ``time_limit``, ``max_cost`` or ``stopped``."""
    checkpoint: str | None
    """``tinker://`` path of the last weights kept for sampling."""
    evaluations: tuple[Evaluation, ...]
    """On the held-out questions, in order."""
    seconds: float
    """Seconds of reinforcement learning, earlier sessions included."""
    best: KeptCheckpoint | None = None
    """The kept weights with the highest exact match on the held-out questions; None before any evaluation. Their score is
    biased upwards by the selection: report them on other questions."""
    cost: Cost | None = None
    """Cost so far, earlier sessions included."""
    estimated_cost: CostEstimate | None = None
    """Estimated cost of the whole run; None for a run read from its folder."""
