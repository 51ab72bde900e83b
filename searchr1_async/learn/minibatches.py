"""Which groups go to the trainer together, decided as they finish."""

from __future__ import annotations

from searchr1_async.episodes.types import Group


class MinibatchGatherer:
    """Cuts a batch into minibatches in the order in which its groups finish; a pure count, with nothing to wait for.

    Every finished group counts, trained on or not, so a dropped or failed one never leaves a hole that a minibatch waits
    to have filled.
    """

    def __init__(self, groups: int, minibatches: int) -> None:
        minibatches = min(groups, minibatches)
        # Sizes differ by one at most: 10 groups in 4 are 3, 3, 2, 2.
        self._sizes = [groups // minibatches + (i < groups % minibatches) for i in range(minibatches)]
        self._waiting: list[Group] = []

    def add(self, group: Group) -> tuple[Group, ...] | None:
        """The minibatch that this group completes, if it does."""
        self._waiting.append(group)
        if len(self._waiting) < self._sizes[0]:
            return None
        self._sizes.pop(0)
        minibatch, self._waiting = tuple(self._waiting), []
        return minibatch


def drop_reason(group: Group, *, drop_constant_groups: bool) -> str | None:
    """Why a finished group is not trained on; None where it is."""
    if len(group.episodes) < 2:
        return "too_few_episodes"
    if drop_constant_groups and group.is_constant:
        return "constant_reward"
    return None
