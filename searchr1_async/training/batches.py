"""What a batch is made of: minibatches of groups as they finish, advantages within a group, and the batch's learning rate. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from searchr1_async.config import AdvantageName, LearningSettings, NormalizationName, PipelineSettings, RunLearning
from searchr1_async.episodes.types import Group

_MINIMUM = 0.25
"""Smallest fraction of a full minibatch sent to an idle trainer, since each request has a fixed cost."""


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Groups trained on together."""

    groups: tuple[Group, ...]
    tokens: int
    """Tokens of all examples, prompts included, which determine the trainer's time."""
    part: int
    """Index of the optimizer step within the batch, from 0."""


def example_tokens(group: Group) -> int:
    """Tokens of a group's examples; episodes without sampled tokens do not count."""
    return sum(
        len(episode.prompt_tokens) + sum(len(turn.sampled_tokens) + len(turn.appended_tokens) for turn in episode.turns)
        for episode in group.episodes
        if episode.turns
    )


class MinibatchGatherer:
    """Cuts a batch into minibatches of similar token counts as its groups finish. Pure.

    A minibatch is sent when it is full, when the trainer is idle and it is a quarter full, and at the end of a part or batch. Only
    trainable groups are added; dropped or failed ones make the batch smaller.

    A full minibatch has its share of the part's expected tokens, estimated from the mean group size of the last batch (dropped
    groups count as 0), or of the groups seen so far in the first batch. Quick groups are short, so the latter underestimates.
    Shares divide what has not been sent yet, so that the last minibatch is not a remnant.

    Args:
        groups: groups in the batch, trainable or not.
        minibatches: full minibatches in the batch.
        optimizer_steps: parts of the batch; no minibatch spans two parts.
        synchronous: send nothing before the end of the batch.
        mean_tokens: :attr:`mean_tokens` of the last batch's gatherer; None for the first batch.
    """

    def __init__(
        self,
        groups: int,
        minibatches: int,
        *,
        optimizer_steps: int = 1,
        synchronous: bool = False,
        mean_tokens: float | None = None,
    ) -> None:
        if min(groups, minibatches, optimizer_steps) < 1:
            raise ValueError("groups, minibatches and optimizer_steps must be at least 1")
        self._groups = groups
        self.part_ends = {groups * part // optimizer_steps for part in range(1, optimizer_steps)}
        """Numbers of groups, dropped ones included, after which a part but the last ends."""
        self._groups_per_part = groups / optimizer_steps
        self._minibatches_per_part = max(1.0, minibatches / optimizer_steps)
        self._synchronous = synchronous
        self._prior = mean_tokens
        self._part = 0
        self._waiting: list[tuple[Group, int]] = []
        self._deferred: list[Minibatch] = []
        self._sent_tokens, self._sent_early, self._sent_full = 0, 0, 0
        """In this part: tokens sent, tokens sent early to an idle trainer, and full minibatches sent."""
        self._part_groups, self._part_tokens = 0, 0
        self._all_tokens = 0

    @classmethod
    def of(cls, learning: RunLearning, pipeline: PipelineSettings, mean_tokens: float | None) -> MinibatchGatherer:
        """The gatherer of a run's next batch."""
        return cls(
            learning.groups_per_batch,
            learning.minibatches,
            optimizer_steps=learning.optimizer_steps,
            synchronous=pipeline.synchronous,
            mean_tokens=mean_tokens,
        )

    @property
    def mean_tokens(self) -> float | None:
        """Mean tokens per group of this batch once it is over; the prior if there were none."""
        return self._all_tokens / self._groups if self._all_tokens else self._prior

    @property
    def is_enough(self) -> bool:
        """Whether :meth:`trainer_is_idle` would send something."""
        return not self._synchronous and self._waiting_tokens() >= _MINIMUM * self._full() and bool(self._waiting)

    def add(self, group: Group) -> list[Minibatch]:
        """Adds a finished trainable group; returns the minibatch to send, if any."""
        tokens = example_tokens(group)
        self._waiting.append((group, tokens))
        self._part_groups, self._part_tokens = self._part_groups + 1, self._part_tokens + tokens
        self._all_tokens += tokens
        if self._synchronous:
            return []
        # Rounds to the nearest group: half a group short is as good as half a group over.
        half_group = self._part_tokens / self._part_groups / 2
        if self._waiting_tokens() <= self._share() - half_group:
            return []
        self._sent_full += 1
        return [self._send()]

    def trainer_is_idle(self) -> list[Minibatch]:
        """Returns the minibatch to send to an idle trainer, if any."""
        if not self.is_enough:
            return []
        self._sent_early += self._waiting_tokens()
        return [self._send()]

    def end_part(self) -> list[Minibatch]:
        """Ends a part, once all its groups finished; returns its remaining minibatches."""
        rest = self._cut(self._waiting)
        self._waiting = []
        self._part += 1
        self._part_groups = self._part_tokens = 0
        self._sent_tokens = self._sent_early = self._sent_full = 0
        if not self._synchronous:
            return rest
        self._deferred += rest
        return []

    def end_batch(self) -> list[Minibatch]:
        """Ends the batch; returns its remaining minibatches, part by part."""
        rest = self.end_part()
        deferred, self._deferred = self._deferred, []
        return deferred + rest

    def _send(self) -> Minibatch:
        minibatch = self._minibatch(self._waiting)
        self._waiting = []
        self._sent_tokens += minibatch.tokens
        return minibatch

    def _minibatch(self, groups: Sequence[tuple[Group, int]]) -> Minibatch:
        return Minibatch(tuple(group for group, _ in groups), sum(tokens for _, tokens in groups), self._part)

    def _waiting_tokens(self) -> int:
        return self._part_tokens - self._sent_tokens

    def _expected(self) -> float:
        if self._prior is None:
            return self._groups_per_part * self._part_tokens / max(1, self._part_groups)
        out = max(0.0, self._groups_per_part - self._part_groups)
        return max(self._groups_per_part * self._prior, self._part_tokens + out * self._prior)

    def _full(self) -> float:
        return self._expected() / self._minibatches_per_part

    def _share(self) -> float:
        """Tokens of the next minibatch, such that the rest splits into a whole number of them."""
        early = self._sent_early / max(1.0, self._full())
        still = round(self._minibatches_per_part - self._sent_full - early)
        return (self._expected() - self._sent_tokens) / max(1, still)

    def _cut(self, groups: Sequence[tuple[Group, int]]) -> list[Minibatch]:
        """Splits groups in order into full minibatches of nearly equal token counts."""
        total = sum(tokens for _, tokens in groups)
        parts = min(len(groups), max(1, round(total / max(1.0, self._full()))))
        out: list[Minibatch] = []
        start, before = 0, 0
        for number in range(1, parts):
            end, goal = start, number * total / parts
            # At least one group each.
            while end < len(groups) - (parts - number) and (end == start or before + groups[end][1] / 2 <= goal):
                before += groups[end][1]
                end += 1
            out.append(self._minibatch(groups[start:end]))
            start = end
        return [*out, self._minibatch(groups[start:])] if groups else []


_SMALLEST_DEVIATION = 1e-6
"""Added to a group's standard deviation, so that constant rewards give advantages of 0."""
NOMINAL_TOKENS = 256
"""Sampled tokens at which both normalizations weigh an episode the same."""


def advantages(rewards: Sequence[float], kind: AdvantageName = "centred") -> list[float]:
    """One advantage per member, in order; they sum to 0. A single member gets 0.

    - ``centred``: ``reward - mean``, as in the recipe. Dividing by the standard deviation would weight questions by how
      nearly constant their rewards are (Liu et al., 2025, "Understanding R1-Zero-Like Training", question-level difficulty
      bias).
    - ``scaled``: ``(reward - mean) / (deviation + 1e-6)`` (Shao et al., 2024, "DeepSeekMath", GRPO), with Bessel's correction
      (n - 1) as in common GRPO implementations.
    - ``leave_one_out``: the reward minus the mean of the *other* members (Ahmadian et al., 2024, "Back to Basics", RLOO): the
      centred advantage times ``n / (n - 1)``, which only matters if group sizes differ.
    """
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(rewards) / count
    centred = [reward - mean for reward in rewards]
    if kind == "scaled":
        deviation = math.sqrt(math.fsum(value * value for value in centred) / (count - 1))
        return [value / (deviation + _SMALLEST_DEVIATION) for value in centred]
    if kind == "leave_one_out":
        return [value * count / (count - 1) for value in centred]
    return centred


def token_weight(sampled_tokens: int, normalization: NormalizationName) -> float:
    """Factor of an episode's advantage at each sampled token.

    Tinker's losses are sums over tokens. ``token``: 1, so an episode weighs as much as it has tokens. ``sequence``:
    ``256 / sampled_tokens``, GRPO's ``1 / |o|`` times a constant, so that episodes weigh the same. The constant keeps the gradient
    at the scale of ``token``, for which ``gradient_clip``, Adam's epsilon and the ``dro`` penalty are set. It is fixed rather than
    a batch mean, so that minibatches can be sent before the batch is complete.
    """
    return 1.0 if normalization == "token" else NOMINAL_TOKENS / max(1, sampled_tokens)


def learning_rate_at(settings: LearningSettings, step: int, total: int) -> float:
    """Learning rate of batch ``step`` (from 1) of ``total``.

    Linear warm-up over ``schedule_warmup`` batches, the last at the peak rate; then constant, or linear or cosine decay that
    would reach 0 one batch after the last. Batches after ``total`` keep the last rate.

    Raises:
        ValueError: ``step`` or ``total`` is below 1.
    """
    if step < 1 or total < 1:
        raise ValueError(f"learning rate of step {step} of {total}: both count from 1")
    peak, warmup = settings.learning_rate, settings.schedule_warmup
    if step < warmup:
        return peak * step / warmup
    highest = max(1, warmup)
    done = (min(step, max(total, highest)) - highest) / (max(total, highest) - highest + 1)
    if settings.schedule == "linear":
        return peak * (1.0 - done)
    if settings.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak
