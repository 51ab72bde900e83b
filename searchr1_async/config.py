"""Typed settings. Defaults are those of the Search-R1 recipe of tinker-cookbook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from searchr1_async.boundary.settings import (
    Count,
    Natural,
    NotNegative,
    Positive,
    Range,
    Seconds,
    Share,
    check_settings,
)
from searchr1_async.errors import ConfigurationError

LossName = Literal["importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"]
WeightsInFlight = Literal["snapshot", "inflight"]
AdvantageName = Literal["centred", "scaled", "leave_one_out"]
NormalizationName = Literal["token", "sequence"]
ScheduleName = Literal["constant", "linear", "cosine"]
FirstTurn = Literal["auto", "shared", "split"]

MAX_SERVICE_OUTAGE = 3600.0
"""Seconds that work waits for a Tinker service that does not answer."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Limits of one episode.

    Raises:
        ConfigurationError: a limit is below 1, or ``max_trajectory_tokens`` leaves no room for a turn.
    """

    max_turns: Count = 5
    """Sampled turns per episode; a search call in the last turn is not run."""
    max_tokens: Count = 1024
    """Sampled tokens per turn."""
    max_trajectory_tokens: Count = 32 * 1024
    """Tokens of the whole episode; a turn starts only if ``max_tokens`` more would fit."""
    max_queries_per_call: Count = 20
    """Queries per search call; a call with more is malformed."""
    malformed_calls: Literal["end", "tell"] = "end"
    """On a malformed call, ``end`` the episode (the recipe) or ``tell`` the model the error and continue (Search-R1)."""
    max_seconds: Seconds | None = None
    """Wall-clock seconds per episode, queueing included; None: no limit. An episode cut by it is never trained on, which biases
    training towards short episodes: set it far out in the tail. Counted in ``env/all/stop/time_limit``."""

    def __post_init__(self) -> None:
        check_settings(self)
        _require(
            self.max_trajectory_tokens > self.max_tokens,
            f"max_trajectory_tokens ({self.max_trajectory_tokens}) must be over max_tokens ({self.max_tokens}): "
            "no turn would fit",
        )


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How turns are sampled."""

    temperature: NotNegative = 1.0
    """1 samples from the policy itself, as the losses assume; 0 is greedy (evaluation)."""
    seed: int | None = None
    """Each request's seed is derived from this, the question, the group member and the turn; None: the service chooses."""
    deadline: Seconds = 1800.0
    """Seconds per turn, queueing at the service and retries included; then the episode fails."""
    max_episodes_in_flight: Count = 4096
    """Episodes in flight over all processes, which bounds memory (at most 60 KB each). How many of them sample at once adapts
    to the service."""
    first_turn: FirstTurn = "auto"
    """Sample a group's first turns with one request for all members (``shared``: less client CPU, but every member waits for the
    slowest), one request per member (``split``), or whichever measures cheaper (``auto``)."""
    workers: Count | Literal["auto"] = 1
    """Rollout processes. 1: this one. 2 or more: that many workers (0.4 GB each), and this process only searches, scores and
    trains. ``auto``: starts with this process and adds workers, up to the number of cores, while all are CPU-bound."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """How rollout and training overlap.

    A batch is ``groups_per_batch`` groups, in the order they finish. With ``max_staleness`` k, a group that started with the
    weights after v optimiser batches is trained on in batch v + 1 + k at the latest: that batch waits for it, and no group
    starts that could be later. So no finished group is discarded as stale.
    """

    max_staleness: Natural = 0
    """How many batches old the weights a group was sampled from may be. 0 is on-policy: nothing samples while the optimiser
    steps. From 1 on, the next batch's episodes start while the last ones finish and while the trainer works."""
    synchronous: bool = False
    """Train only once the whole batch is rolled out, as in a plain loop; the gradient is the same as with streaming."""
    weights_in_flight: WeightsInFlight = "snapshot"
    """``snapshot``: an episode keeps the weights it started with. ``inflight``: running episodes switch to new weights as they
    are published and keep their key/value cache; every token keeps the log-probability it was sampled with, so importance
    ratios stay exact. The service does not report which weights sampled a token, so versions and staleness are those of the
    episode's start: an upper bound. With ``max_staleness=0`` nothing is published while episodes run, and both are the same."""
    spare_groups: Natural = 0
    """Extra groups started per batch. Once the batch is full, up to this many of its slowest groups are cancelled and dropped as
    ``too_slow``. Biases training towards questions with short episodes."""
    refill_groups: Natural = 0
    """Extra groups per batch, rolled out to replace groups whose rewards are all equal (dynamic sampling: Yu et al., 2025,
    "DAPO"). Biases training towards questions of medium difficulty, on purpose."""
    min_members: Annotated[int, Range(at_least=2)] = 2
    """Finished episodes a group needs to be trained on, at least 2 for an advantage; with fewer it is dropped as
    ``too_few_episodes``. A group cut by ``step_time_limit`` is trained on without its slowest, which biases it to short episodes."""
    step_time_limit: Seconds | None = None
    """Seconds to roll out a batch, counted from when its weights are published. Groups still running then are cut: trained on
    with the members they have, or dropped as ``step_time_limit``. None: no limit."""

    def __post_init__(self) -> None:
        check_settings(self)
        _require(
            not (self.synchronous and self.max_staleness),
            "synchronous learning is on-policy: choose max_staleness=0, or synchronous=False",
        )

    @property
    def is_off_policy(self) -> bool:
        """Groups may be sampled from older or changing weights."""
        return self.max_staleness > 0 or self.weights_in_flight == "inflight"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Supervised warm-up on demonstrations before reinforcement learning.

    A demonstration is a scripted episode (ideal searches, then the answer) run through the real search. Only those whose
    passages contain a golden answer are trained on, so the model does not learn to guess.
    """

    steps: Count = 8
    """Optimiser steps."""
    batch_size: Count = 16
    """Demonstrations per step. 6 to 15 steps of 16 taught a 135M model 95 to 99 % valid calls."""
    learning_rate: Positive = 1e-3
    """Peak, with linear decay to a tenth."""

    def __post_init__(self) -> None:
        check_settings(self, "the warm-up's ")


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """How groups become optimiser steps."""

    group_size: Annotated[int, Range(at_least=2)] = 8
    """Episodes per question, at least 2: advantages are centred over them."""
    groups_per_batch: Count = 512
    """Questions per batch."""
    minibatches: Count = 4
    """Parts of a batch, equal in tokens, sent to the trainer as their groups finish (streaming). More are sent if the trainer
    would be idle."""
    optimizer_steps: Count = 1
    """Optimiser steps per batch, each on an equal share of its groups in the order they finished (``num_substeps`` of
    tinker-cookbook); the k-th learns from weights k - 1 steps old."""
    learning_rate: Positive = 4e-5
    """Peak learning rate."""
    schedule: ScheduleName = "constant"
    """Learning rate over all batches: constant (the recipe), or linear or half-cosine decay to 0."""
    schedule_warmup: Natural = 0
    """Batches of linear learning-rate warm-up."""
    lora_rank: Count = 32
    beta1: Share = 0.9
    beta2: Share = 0.95
    epsilon: Positive = 1e-8
    gradient_clip: NotNegative = 0.0
    """Maximum global gradient norm; 0 is off (the recipe)."""
    loss: LossName | None = None
    """A loss of the service, or None to choose, which the run reports: ``importance_sampling`` on-policy (the recipe);
    off-policy (``max_staleness`` above 0 or ``inflight`` weights) ``stable_reinforce`` if the service has it, else the clipped
    ``ppo``. With ``loss_config``, or when only ``optimizer_steps`` is above 1, ``ppo``. Off-policy, the importance ratio is
    unbounded in the unclipped loss and a few tokens could dominate a step (Schulman et al., 2017, "Proximal Policy Optimization
    Algorithms"). A resumed run keeps its loss.

    ``stable_reinforce`` accepts only samples recorded in the same session less than a day ago. Groups that finished before a
    resume, or more than 20 hours before training, are therefore trained on with ``ppo`` in the same optimiser step, with an
    extra request per mixed minibatch. ``optim/fallback_datums`` counts them."""
    loss_config: Mapping[str, float] = field(default_factory=dict)
    """Passed to the service with the loss (``clip_low_threshold``, …); not to the ``ppo`` fallback of ``stable_reinforce``."""
    advantage: AdvantageName = "centred"
    """``centred``: ``reward - mean`` of the group (the recipe). ``scaled``: divided by the group's standard deviation (GRPO).
    ``leave_one_out``: minus the mean of the other members (RLOO)."""
    normalization: NormalizationName = "token"
    """``token``: every sampled token of a batch has equal weight (the recipe). ``sequence``: every episode has equal weight,
    shared by its tokens."""
    kl_coefficient: NotNegative = 0.0
    """Coefficient of a per-token KL penalty towards the base model, added to the advantages; 0 is off. Costs one request per episode."""
    drop_constant_groups: bool = True
    """Leave out groups whose rewards are all equal: their advantages are 0."""
    epochs: Count = 1
    """Passes over the questions when ``steps`` is None; each is shuffled with the seed and the epoch number."""
    steps: Count | None = None
    """Batches to train; None: all batches of ``epochs``, the last partial one included."""
    seed: int = 2
    checkpoint_every: Count = 20
    """Steps between permanent checkpoints; the resume point is also written after every step."""
    max_failed_fraction: Share = 0.2
    """Fraction of failed episodes per batch above which the run stops: a service is broken, and the rest would be biased."""
    training_deadline: Seconds = 3600.0
    """Seconds one step's training calls may take, longer while the service reports a capacity pause. Time in which the service
    does not answer counts towards ``max_service_outage`` instead."""

    def __post_init__(self) -> None:
        check_settings(self)
        _require(
            self.minibatches <= self.groups_per_batch,
            f"minibatches ({self.minibatches}) must not exceed groups_per_batch ({self.groups_per_batch})",
        )
        _require(
            self.optimizer_steps <= self.groups_per_batch,
            f"optimizer_steps ({self.optimizer_steps}) must not exceed groups_per_batch ({self.groups_per_batch})",
        )


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """Options of the embedded Tinker service."""

    port: Annotated[int, Range(at_least=0, at_most=65_535)] = 0
    """0: any free port."""
    threads: Count | None = None
    """CPU threads of the model; None: all cores."""
    dtype: str = "auto"
    """``float32``, ``bfloat16`` or ``auto``: bfloat16 where the machine runs it fast."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``mps`` or ``auto``."""
    start_timeout: Seconds = 180.0
    """Seconds for loading the model; the first conversion takes about 20 s."""

    def __post_init__(self) -> None:
        check_settings(self)
