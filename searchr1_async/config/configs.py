"""The configs of the public functions, and the sizes of a run: the recipe's, or a laptop's on the embedded service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from searchr1_async.boundary.settings import Count, settings_of
from searchr1_async.config.base import Config
from searchr1_async.config.concerns import (
    DEFAULT_RANK,
    BatchSettings,
    CheckpointSettings,
    CostSettings,
    EpisodeLimits,
    EpisodeSettings,
    FaultSettings,
    HeldOutSettings,
    LearningSettings,
    LengthSettings,
    LocalOptions,
    Method,
    ModelSettings,
    PipelineSettings,
    SamplingSettings,
    ScoringSettings,
    SelectionSettings,
    WarmUp,
)
from searchr1_async.errors import ConfigurationError

# ruff: noqa: RUF009 (the concerns are frozen: one default serves all)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a run, named as its settings; ``steps=None`` is all batches of ``epochs``."""

    group_size: int
    groups_per_batch: int
    minibatches: int
    steps: int | None
    max_turns: int
    max_tokens: int
    max_trajectory_tokens: int
    epochs: int = 1

    def __str__(self) -> str:
        steps = "" if self.steps is None else f"{self.steps} steps of "
        return (
            f"{steps}{self.groups_per_batch} groups of {self.group_size} episodes, at most {self.max_turns} turns of "
            f"{self.max_tokens} tokens"
        )


RECIPE = settings_of(Sizes, asdict(EpisodeLimits()), group_size=8, groups_per_batch=512, minibatches=4, steps=None)
"""Sizes of the Search-R1 recipe of tinker-cookbook."""
LAPTOP = replace(RECIPE, groups_per_batch=8, steps=12, max_turns=3, max_tokens=64, max_trajectory_tokens=4096)
"""Sizes on the embedded service: 768 episodes; one step of the recipe has 4,096, most of a day on two cores."""


def chosen_sizes(
    given: Mapping[str, Any], *, questions: int, is_embedded: bool, begun: Mapping[str, Any] | None = None
) -> Sizes:
    """The sizes of a run.

    Args:
        given: the settings by their flat names; None: not set.
        questions: number of training questions; a run with the laptop's default steps uses each at most once.
        is_embedded: on the embedded service.
        begun: recorded settings of the run to resume, whose sizes apply.
    """
    own = {**(begun or {}).get("limits", {}), **(begun or {}).get("learning", {})}
    known = own | {name: value for name, value in given.items() if value is not None} | {"steps": given.get("steps")}
    default = LAPTOP if is_embedded else RECIPE
    sizes = settings_of(Sizes, asdict(default) | known)
    if "minibatches" not in known:
        sizes = replace(sizes, minibatches=min(sizes.minibatches, sizes.groups_per_batch))
    says_nothing = all(given.get(name) is None for name in ("steps", "groups_per_batch", "epochs", "time_limit"))
    # A run started with another batch size was started to complete its epochs.
    if not says_nothing or default.steps is None or sizes.groups_per_batch != default.groups_per_batch:
        return sizes
    return replace(sizes, steps=default.steps) if questions > default.steps * sizes.groups_per_batch else sizes


@dataclass(frozen=True, init=False, repr=False)
class AskConfig(Config):
    """Settings of :func:`searchr1_async.ask`: greedy, with a shorter deadline than in training, since a person waits."""

    model: ModelSettings = ModelSettings()
    episode: EpisodeSettings = EpisodeSettings()
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, deadline=600.0)
    local: LocalOptions = LocalOptions()


@dataclass(frozen=True, init=False, repr=False)
class RolloutConfig(Config):
    """Settings of :func:`searchr1_async.rollout`. Open episode settings are those of the run whose weights are used."""

    group_size: Count = 8
    """Episodes per question."""
    model: ModelSettings = ModelSettings()
    episode: EpisodeSettings = EpisodeSettings()
    sampling: SamplingSettings = SamplingSettings()
    faults: FaultSettings = FaultSettings()
    local: LocalOptions = LocalOptions()


@dataclass(frozen=True, init=False, repr=False)
class EvalConfig(Config):
    """Settings of :func:`searchr1_async.evaluate`.

    Open episode settings: a run uses those of its training; the base model those of the evaluated runs if they agree; a baseline
    keeps its own prompt and the default limits; without runs, the recipe's defaults apply. The same holds for the number and length
    of passages if ``search`` does not set them. Differences from training are listed in the report's notes. A run's episode time
    limit does not apply.
    """

    label: str = "evaluation"
    """Label of the system, if there is one without a label."""
    baselines: Sequence[Method] = ()
    """Additional systems that use the base model in other ways: ``direct``, ``rag``, ``recipe`` (the last needs
    ``pip install 'searchr1_async[recipe]'``); see :class:`~searchr1_async.evaluation.plan.System`."""
    selection: SelectionSettings = SelectionSettings()
    model: ModelSettings = ModelSettings()
    episode: EpisodeSettings = EpisodeSettings()
    sampling: SamplingSettings = SamplingSettings(seed=0, max_episodes_in_flight=1024)
    scoring: ScoringSettings = ScoringSettings()
    faults: FaultSettings = FaultSettings()
    local: LocalOptions = LocalOptions()


@dataclass(frozen=True, init=False, repr=False)
class TrainConfig(Config):
    """Settings of :func:`searchr1_async.train`. Defaults are those of the Search-R1 recipe of tinker-cookbook; sizes left at None are
    chosen by the service, a laptop's on the embedded one."""

    warm_up: WarmUp | None = None
    """A supervised warm-up on demonstrations; None for none."""
    model: ModelSettings = ModelSettings()
    episode: EpisodeSettings = EpisodeSettings()
    sampling: SamplingSettings = SamplingSettings(seed=2)
    """Its seed also orders the questions, draws the demonstrations and initialises the adapter."""
    batch: BatchSettings = BatchSettings()
    learning: LearningSettings = LearningSettings()
    pipeline: PipelineSettings = PipelineSettings()
    length: LengthSettings = LengthSettings()
    evaluation: HeldOutSettings = HeldOutSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    scoring: ScoringSettings = ScoringSettings()
    faults: FaultSettings = FaultSettings()
    cost: CostSettings = CostSettings()
    local: LocalOptions = LocalOptions()

    @property
    def seed(self) -> int:
        """The run's seed."""
        assert self.sampling.seed is not None, "checked when created"
        return self.sampling.seed

    def _check_relations(self) -> None:
        batch, min_members = self.batch, self.pipeline.min_members
        if self.sampling.seed is None:
            raise ConfigurationError("seed is None: a training run needs an integer, which orders its questions")
        steps, groups = self.learning.optimizer_steps, batch.groups_per_batch
        if groups is not None and steps > groups:
            raise ConfigurationError(f"optimizer_steps ({steps}) must not exceed groups_per_batch ({groups})")
        if batch.group_size is not None and min_members > batch.group_size:
            raise ConfigurationError(
                f"min_members ({min_members}) is above group_size ({batch.group_size}): no group would be trained on"
            )
        if self.pipeline.refill_groups and not batch.drop_constant_groups:
            raise ConfigurationError("refill_groups replaces dropped groups: it needs drop_constant_groups=True")
        if self.checkpoints.keep_best and self.evaluation.evaluate_every is None:
            raise ConfigurationError("keep_best needs evaluate_every: it selects among the evaluated steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLearning(LearningSettings):
    """The learning settings of a run with its sizes, all of them chosen; each is documented at its concern."""

    lora_rank: int = DEFAULT_RANK
    group_size: int
    groups_per_batch: int
    minibatches: int
    drop_constant_groups: bool
    steps: int | None
    epochs: int
    seed: int
    checkpoint_every: int
    max_failed_fraction: float

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Those of a config whose sizes are chosen."""
        return settings_of(cls, config.flat())
