"""Which groups go to the trainer together, and when: decided as they finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from searchr1_async.episodes.types import Group

_MINIMUM = 0.25
"""Of a full minibatch: less is not sent to a trainer that is idle, since a request costs it a fixed time too."""


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Groups that are learned from together."""

    groups: tuple[Group, ...]
    tokens: int
    """Of all their examples, what was only read included: what the trainer's time goes by."""
    part: int
    """Which of the batch's optimiser steps it belongs to, from 0."""


def example_tokens(group: Group) -> int:
    """Tokens that a group gives the trainer to read; an episode in which nothing was sampled gives none."""
    return sum(
        len(episode.prompt_tokens) + sum(len(turn.sampled_tokens) + len(turn.appended_tokens) for turn in episode.turns)
        for episode in group.episodes
        if episode.turns
    )


class MinibatchGatherer:
    """Cuts a batch into minibatches alike in tokens, as its groups finish; pure, with nothing to wait for.

    A minibatch goes out when it is full; when the trainer is idle and a quarter of a full one is there; and whatever is
    left at the end of a part, or of the batch. Only groups that are learned from come in, so that a dropped or failed one
    leaves no hole that anything waits for: it only makes the batch smaller than expected.

    A minibatch is full at its share of the tokens that its part is expected to have: as many a group as the last batch had,
    dropped groups counted as nothing; of the first batch, as those seen. Quick groups are short, so those seen expect too
    little for most of a batch. The shares are of what has not gone out yet, so the last minibatch is not a remnant.

    Args:
        groups: of the batch, learned from or not.
        minibatches: full ones in the whole batch.
        optimizer_steps: parts of the batch; no minibatch crosses a part's end.
        synchronous: nothing goes out before the batch's end.
        mean_tokens: a group of the last batch, from its gatherer's :attr:`mean_tokens`; None where there was none.
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
        self._groups_a_part = groups / optimizer_steps
        self._minibatches_a_part = max(1.0, minibatches / optimizer_steps)
        self._synchronous = synchronous
        self._prior = mean_tokens
        self._part = 0
        self._waiting: list[tuple[Group, int]] = []
        self._held: list[Minibatch] = []
        self._sent_tokens, self._sent_early, self._sent_full = 0, 0, 0
        """Of this part: tokens gone out, those of them that went to an idle trainer, and full minibatches gone out."""
        self._part_groups, self._part_tokens = 0, 0
        self._all_tokens = 0

    @property
    def mean_tokens(self) -> float | None:
        """Tokens a group of this batch, once it is over; what was expected where no group came."""
        return self._all_tokens / self._groups if self._all_tokens else self._prior

    @property
    def is_enough(self) -> bool:
        """Whether :meth:`trainer_is_idle` would send something."""
        return not self._synchronous and self._waiting_tokens() >= _MINIMUM * self._full() and bool(self._waiting)

    def add(self, group: Group) -> list[Minibatch]:
        """A group that is learned from has finished; what goes out with it, if anything."""
        tokens = example_tokens(group)
        self._waiting.append((group, tokens))
        self._part_groups, self._part_tokens = self._part_groups + 1, self._part_tokens + tokens
        self._all_tokens += tokens
        if self._synchronous:
            return []
        # Half a group too few is as near as half a group too many.
        half_a_group = self._part_tokens / self._part_groups / 2
        if self._waiting_tokens() <= self._share() - half_a_group:
            return []
        self._sent_full += 1
        return [self._send()]

    def trainer_is_idle(self) -> list[Minibatch]:
        """The trainer has nothing to do: what goes out for that reason, if anything."""
        if not self.is_enough:
            return []
        self._sent_early += self._waiting_tokens()
        return [self._send()]

    def end_part(self) -> list[Minibatch]:
        """As many groups as a part has are there, learned from or not: the rest of it, if any."""
        rest = self._cut(self._waiting)
        self._waiting = []
        self._part += 1
        self._part_groups = self._part_tokens = 0
        self._sent_tokens = self._sent_early = self._sent_full = 0
        if not self._synchronous:
            return rest
        self._held += rest
        return []

    def end_batch(self) -> list[Minibatch]:
        """The batch is over: whatever has not gone out, part by part."""
        rest = self.end_part()
        held, self._held = self._held, []
        return held + rest

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
        """Tokens of this part."""
        if self._prior is None:
            return self._groups_a_part * self._part_tokens / max(1, self._part_groups)
        out = max(0.0, self._groups_a_part - self._part_groups)
        return max(self._groups_a_part * self._prior, self._part_tokens + out * self._prior)

    def _full(self) -> float:
        return self._expected() / self._minibatches_a_part

    def _share(self) -> float:
        """A full minibatch, such that what is left to go out makes a whole number of them."""
        early = self._sent_early / max(1.0, self._full())
        still = round(self._minibatches_a_part - self._sent_full - early)
        return (self._expected() - self._sent_tokens) / max(1, still)

    def _cut(self, groups: Sequence[tuple[Group, int]]) -> list[Minibatch]:
        """In order, into as many as are full, each end where it is nearest to its share of the tokens."""
        total = sum(tokens for _, tokens in groups)
        parts = min(len(groups), max(1, round(total / max(1.0, self._full()))))
        out: list[Minibatch] = []
        start, before = 0, 0
        for number in range(1, parts):
            end, goal = start, number * total / parts
            # At least one group each, and one left for each that follows.
            while end < len(groups) - (parts - number) and (end == start or before + groups[end][1] / 2 <= goal):
                before += groups[end][1]
                end += 1
            out.append(self._minibatch(groups[start:end]))
            start = end
        return [*out, self._minibatch(groups[start:])] if groups else []


def drop_reason(group: Group, *, drop_constant_groups: bool, min_members: int = 2) -> str | None:
    """Why a finished group is not trained on; None where it is.

    Args:
        min_members: finished episodes that it needs; the others failed, or were cut by a time limit.
    """
    if len(group.episodes) < min_members:
        return "too_few_episodes"
    if drop_constant_groups and group.is_constant:
        return "constant_reward"
    return None
