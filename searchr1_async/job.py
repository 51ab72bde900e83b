"""A training job's input and result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
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
from searchr1_async.episodes.rewards import RewardFunction
from searchr1_async.episodes.types import Question
from searchr1_async.estimate import CostEstimate, RunShape, mean_letters
from searchr1_async.evaluation.result import Evaluation
from searchr1_async.inputs import inputs_of
from searchr1_async.learn.checkpoints import KeptCheckpoint, ResumePoint
from searchr1_async.learn.demonstrations import Demonstration
from searchr1_async.models import Price, Thinking
from searchr1_async.rollout.order import QuestionOrder
from searchr1_async.search import Search
from searchr1_async.service.connection import ServiceName
from searchr1_async.starting import Start


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
            # Compared separately: see :mod:`searchr1_async.inputs`.
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
