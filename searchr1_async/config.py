"""Settings, typed, with the ancestor recipe's defaults; every field says its unit and its reason."""

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
"""Seconds for which work waits for a Tinker service that does not answer."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """How long an episode may become.

    Raises:
        ConfigurationError: a limit below 1, or a trajectory that cannot hold one turn.
    """

    max_turns: Count = 5
    """Sampled turns an episode; a search asked for in the last is not run, since nothing could use it."""
    max_tokens: Count = 1024
    """New tokens a turn."""
    max_trajectory_tokens: Count = 32 * 1024
    """Tokens of the whole episode; a turn begins only if ``max_tokens`` more would fit, so none is cut by it."""
    max_queries_per_call: Count = 20
    """Queries one call may hold; more is a malformed call, so that one episode cannot flood the search."""
    malformed_calls: Literal["end", "tell"] = "end"
    """A malformed call ends the episode (the recipe), or the model is told what was wrong and goes on (Search-R1)."""
    max_seconds: Seconds | None = None
    """Seconds of wall-clock time an episode, queueing included; None: no limit. A cut episode is never trained on, since
    what was slow may be the service: this biases what is learned towards short episodes, so set it far out in the tail.
    Counted in ``env/all/stop/time_limit``."""

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
    """1 keeps the log-probabilities those of the policy itself, which the losses assume; 0 is greedy (evaluation)."""
    seed: int | None = None
    """Makes each request's seed from this, the question, the member and the turn; None lets the service choose."""
    deadline: Seconds = 1800.0
    """Seconds that one turn may take in all, queueing at the service included; then the episode fails."""
    max_episodes_in_flight: Count = 4096
    """Episodes at once, all processes together: a bound on memory (at most 60 KB each). How many of them sample at a time is
    found while they run."""
    first_turn: FirstTurn = "auto"
    """The first turns of a group as one request for all members (``shared``: an eighth of the client's work with groups of
    8, but all members wait for the slowest), one request each (``split``), or what costs less as measured (``auto``)."""
    workers: Count | Literal["auto"] = 1
    """Processes that play. 1 is this one. From 2 on so many are started beside it, each with 3 s of CPU and 0.4 GB, and this one
    only searches, scores and learns. ``auto`` begins with this one and adds others, up to the cores, while all that play are
    saturated (the SDK takes 3 ms of CPU a sample, on one thread)."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """How playing and learning overlap, and what becomes of the slowest.

    A batch is ``groups_per_batch`` groups, in the order in which they finish. With ``max_staleness`` k, a group that began
    under weights of version v (v optimiser batches done) is trained on in batch v + 1 + k at the latest: a batch that holds
    such groups waits for them, and no group starts that could come too late. So nothing finished is ever thrown away.
    """

    max_staleness: Natural = 0
    """How many batches older than the newest the weights may be that a group was sampled from. 0 is on-policy: nothing samples
    while the optimiser steps. From 1 on the next batch's episodes start while the last ones finish and while the
    trainer works."""
    synchronous: bool = False
    """Learning begins when the whole batch is played, as in a plain loop; the gradient is the same as with streaming."""
    weights_in_flight: WeightsInFlight = "snapshot"
    """``snapshot``: an episode keeps the weights that it began with. ``inflight``: running episodes go on with newer weights as
    these are published, and keep their key/value cache; each token keeps the log-probability it was sampled with, so importance
    ratios stay right. The service does not say which weights sampled a token, only that they are those of the episode's
    beginning or newer. So the version on a turn, and with it every figure of staleness and the rule of ``max_staleness``,
    is that of the episode's beginning: an upper bound of how old the weights were. With ``max_staleness=0`` nothing is
    published while episodes run, and the two are the same."""
    spare_groups: Natural = 0
    """Groups started beyond a batch; once a batch is full, the slowest of those that would have to be in it are cancelled, at
    most this many, and dropped as ``too_slow``. It biases what is learned towards questions that are played quickly."""
    refill_groups: Natural = 0
    """Groups a batch that may be played in place of such with constant reward, which teach nothing (dynamic sampling: Yu et al.,
    2025, "DAPO"). It biases what is learned towards questions of middling difficulty, which is its purpose."""
    min_members: Annotated[int, Range(at_least=2)] = 2
    """Finished episodes that a group needs to be trained on, at least 2 for an advantage; with fewer it is dropped as
    ``too_few_episodes``. A group cut by ``step_time_limit`` that has as many is trained on without its slowest, which biases it to short episodes."""
    step_time_limit: Seconds | None = None
    """Seconds for the playing of a batch, from the moment that its weights are there; then its groups still under way are cut:
    accepted with the members that they have, or dropped as ``step_time_limit``. None: no limit."""

    def __post_init__(self) -> None:
        check_settings(self)
        _require(
            not (self.synchronous and self.max_staleness),
            "synchronous learning is on-policy: choose max_staleness=0, or synchronous=False",
        )

    @property
    def is_off_policy(self) -> bool:
        """Groups may be sampled from older weights than those that are trained, or from changing ones."""
        return self.max_staleness > 0 or self.weights_in_flight == "inflight"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A supervised warm-up on demonstrations before reinforcement learning.

    A demonstration is an episode played by a script (the ideal searches, then the answer) through the real search; only
    those in which a golden answer was really seen are learned from, so that the model is never taught to guess.
    """

    steps: Count = 8
    """Optimiser steps."""
    batch_size: Count = 16
    """Demonstrations a step. 6 to 15 steps of 16 taught a 135M model 95 to 99 % valid calls."""
    learning_rate: Positive = 1e-3
    """Peak, with a linear decay to a tenth; 25 times that of reinforcement learning, since the target is certain."""

    def __post_init__(self) -> None:
        check_settings(self, "the warm-up's ")


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """How groups become optimiser steps."""

    group_size: Annotated[int, Range(at_least=2)] = 8
    """Episodes a question, at least 2: advantages are centred over them."""
    groups_per_batch: Count = 512
    """Questions an optimiser step."""
    minibatches: Count = 4
    """Parts in which a batch is sent to the trainer, each as soon as enough groups are complete (streaming); alike in
    tokens. More go out where the trainer would be idle."""
    optimizer_steps: Count = 1
    """Optimiser steps a batch, each on an equal share of its groups in the order in which they finished; those after the first
    learn from weights that many steps older (``num_substeps`` of tinker-cookbook)."""
    learning_rate: Positive = 4e-5
    """At its peak."""
    schedule: ScheduleName = "constant"
    """Of the learning rate over all batches: constant (the recipe), or falling to 0 in a line or a half cosine."""
    schedule_warmup: Natural = 0
    """Batches in which the learning rate first rises in a line to its peak."""
    lora_rank: Count = 32
    beta1: Share = 0.9
    beta2: Share = 0.95
    epsilon: Positive = 1e-8
    gradient_clip: NotNegative = 0.0
    """Global norm above which gradients are scaled down; 0 is off, as in the recipe."""
    loss: LossName | None = None
    """One of the service's. None chooses, and the run says what it chose: ``importance_sampling`` on-policy (the recipe);
    ``stable_reinforce`` where ``max_staleness`` is over 0 or ``weights_in_flight`` is ``inflight``, if the service has it;
    else, and where ``loss_config`` is given or only ``optimizer_steps`` is over 1, ``ppo``, which is clipped. Off-policy the ratio
    of a token's probability under the weights being trained to that under the weights that sampled it leaves 1, and grows without
    bound in the unclipped loss, so that a few tokens would rule a step (Schulman et al., 2017, "Proximal Policy Optimization
    Algorithms"). The second optimiser step of a batch is the case that clipping was made for, so it needs nothing that is
    recorded. A resumed run keeps the loss it began with.

    ``stable_reinforce`` takes only what the service recorded in the same session and not more than a day ago. Groups that
    finished before a resume, or 20 hours before they are trained on, are therefore trained on with ``ppo`` in the same optimiser
    step, and are not played again. That costs a request more for each minibatch that holds both kinds. Of a run of six batches with
    ``max_staleness=2`` that was killed twice, 36 of 92 examples had it: all in two batches and 12 of 20 in a third.
    ``optim/fallback_datums`` counts them."""
    loss_config: Mapping[str, float] = field(default_factory=dict)
    """Passed to the service with the loss (``clip_low_threshold``, …); not with the ``ppo`` that stands in for
    ``stable_reinforce``."""
    advantage: AdvantageName = "centred"
    """``reward - mean`` of the group (the recipe); ``scaled`` divides that by the group's standard deviation (GRPO);
    ``leave_one_out`` subtracts the mean of the other members (RLOO)."""
    normalization: NormalizationName = "token"
    """``token``: every sampled token of a batch counts alike (the recipe). ``sequence``: every episode counts alike, its tokens
    sharing its weight, so long episodes do not outweigh short ones."""
    kl_coefficient: NotNegative = 0.0
    """Of a penalty on leaving the base model, added to the advantages token by token; 0 is none. Costs one request an episode."""
    drop_constant_groups: bool = True
    """Leave out groups whose members all earned the same: their advantages are 0, so only their cost would remain."""
    epochs: Count = 1
    """Passes over the questions when ``steps`` is None; each is shuffled anew with the seed and its number."""
    steps: Count | None = None
    """Optimiser steps in all; None: until the epochs are over, the last partial batch included."""
    seed: int = 2
    checkpoint_every: Count = 20
    """Steps between checkpoints that are kept for good; the resume point is written after every step besides."""
    max_failed_fraction: Share = 0.2
    """Failed episodes of a batch above which the run stops: a service is broken, and training on the rest would be biased."""
    training_deadline: Seconds = 3600.0
    """Seconds that one step's training calls may take at a service that answers; more for one that pauses training for capacity.
    Time in which it does not answer at all is ``max_service_outage``'s."""

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
    """How the embedded Tinker service runs, where it is used."""

    port: Annotated[int, Range(at_least=0, at_most=65_535)] = 0
    """0 takes a free one."""
    threads: Count | None = None
    """CPU threads of the model; None: all cores."""
    dtype: str = "auto"
    """``float32``, ``bfloat16`` or ``auto``: bfloat16 only where the machine is fast at it."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``mps`` or ``auto``."""
    start_timeout: Seconds = 180.0
    """Seconds for loading the model; its first conversion takes about 20 s."""

    def __post_init__(self) -> None:
        check_settings(self)
