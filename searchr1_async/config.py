"""Settings, typed, with the ancestor recipe's defaults; every field says its unit and its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from searchr1_async.errors import ConfigurationError

LossName = Literal["importance_sampling", "ppo", "cispo", "dro"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """How long an episode may become.

    Raises:
        ConfigurationError: a limit below 1, or a trajectory that cannot hold one turn.
    """

    max_turns: int = 5
    """Sampled turns an episode; a search asked for in the last is not run, since nothing could use it."""
    max_tokens: int = 1024
    """New tokens a turn."""
    max_trajectory_tokens: int = 32 * 1024
    """Tokens of the whole episode; a turn begins only if ``max_tokens`` more would fit, so none is cut by it."""
    max_queries_per_call: int = 20
    """Queries one call may hold; more is a malformed call, so that one episode cannot flood the search."""
    malformed_calls: Literal["end", "tell"] = "end"
    """A malformed call ends the episode (the recipe), or the model is told what was wrong and goes on (Search-R1)."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tokens", "max_queries_per_call"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        _require(
            self.max_trajectory_tokens > self.max_tokens,
            f"max_trajectory_tokens ({self.max_trajectory_tokens}) must be over max_tokens ({self.max_tokens}): "
            "no turn would fit",
        )


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How turns are sampled."""

    temperature: float = 1.0
    """1 keeps the log-probabilities those of the policy itself, which the losses assume; 0 is greedy (evaluation)."""
    seed: int | None = None
    """Makes each request's seed from this, the question, the member and the turn; None lets the service choose."""
    deadline: float = 1800.0
    """Seconds that one turn may take in all, queueing at the service included; then the episode fails."""
    max_episodes_in_flight: int = 2000
    """Episodes at once; 2,000 is where the tinker SDK queues by itself."""

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, f"temperature is {self.temperature}: it must be 0 or more")
        _require(self.deadline > 0, f"deadline is {self.deadline} s: it must be over 0")
        _require(
            self.max_episodes_in_flight >= 1, f"max_episodes_in_flight is {self.max_episodes_in_flight}: at least 1"
        )


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A supervised warm-up on demonstrations before reinforcement learning.

    A demonstration is an episode played by a script (the ideal searches, then the answer) through the real search; only
    those in which a golden answer was really seen are learned from, so that the model is never taught to guess.
    """

    steps: int = 8
    """Optimiser steps."""
    batch_size: int = 16
    """Demonstrations a step. 6 to 15 steps of 16 taught a 135M model 95 to 99 % valid calls."""
    learning_rate: float = 1e-3
    """Peak, with a linear decay to a tenth; 25 times that of reinforcement learning, since the target is certain."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"warm-up steps is {self.steps}: at least 1 (or warm_up=None for none)")
        _require(self.batch_size >= 1, f"warm-up batch_size is {self.batch_size}: at least 1")
        _require(self.learning_rate > 0, f"warm-up learning_rate is {self.learning_rate}: over 0")


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """How groups become optimiser steps."""

    group_size: int = 8
    """Episodes a question; advantages are centred over them."""
    groups_per_batch: int = 512
    """Questions an optimiser step."""
    minibatches: int = 4
    """Parts in which a batch is sent to the trainer, each as soon as its groups are complete (streaming)."""
    learning_rate: float = 4e-5
    lora_rank: int = 32
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    gradient_clip: float = 0.0
    """Global norm above which gradients are scaled down; 0 is off, as in the recipe."""
    loss: LossName = "importance_sampling"
    loss_config: Mapping[str, float] = field(default_factory=dict)
    """Passed to the service with every ``forward_backward`` (``clip_low_threshold``, …)."""
    drop_constant_groups: bool = True
    """Leave out groups whose members all earned the same: their advantages are 0, so only their cost would remain."""
    epochs: int = 1
    """Passes over the questions when ``steps`` is None; each is shuffled anew with the seed and its number."""
    steps: int | None = None
    """Optimiser steps in all; None: until the epochs are over, the last partial batch included."""
    seed: int = 2
    checkpoint_every: int = 20
    """Steps between checkpoints that are kept for good; the resume point is written after every step besides."""
    max_failed_fraction: float = 0.2
    """Failed episodes of a batch above which the run stops: a service is broken, and training on the rest would be biased."""

    def __post_init__(self) -> None:
        for name in ("group_size", "groups_per_batch", "minibatches", "lora_rank", "epochs", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        _require(self.group_size >= 2, "group_size is 1: advantages are centred over a group, so it needs at least 2")
        _require(
            self.minibatches <= self.groups_per_batch,
            f"minibatches ({self.minibatches}) must not exceed groups_per_batch ({self.groups_per_batch})",
        )
        _require(self.steps is None or self.steps >= 1, f"steps is {self.steps}: at least 1, or None for whole epochs")
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}: it must be over 0")
        _require(self.gradient_clip >= 0, f"gradient_clip is {self.gradient_clip}: it must be 0 (off) or more")
        _require(
            self.loss in get_args(LossName),
            f"unknown loss {self.loss!r}: choose one of {', '.join(get_args(LossName))}",
        )
        _require(0 <= self.max_failed_fraction <= 1, "max_failed_fraction must lie in 0 to 1")


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How the embedded Tinker service runs, where it is used."""

    port: int = 0
    """0 takes a free one."""
    threads: int | None = None
    """CPU threads of the model; None: all cores."""
    dtype: str = "auto"
    """``float32``, ``bfloat16`` or ``auto``: bfloat16 only where the machine is fast at it."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``mps`` or ``auto``."""
    start_timeout: float = 180.0
    """Seconds for loading the model; its first conversion takes about 20 s."""

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, f"port is {self.port}: it must lie in 0 to 65535")
        _require(self.threads is None or self.threads >= 1, f"threads is {self.threads}: at least 1, or None for all")
        _require(self.start_timeout > 0, f"start_timeout is {self.start_timeout} s: it must be over 0")
