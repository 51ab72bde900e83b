"""Which policies the workers hold: each is sent once a worker and version, and dropped when nobody plays it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from searchr1_async.errors import ConfigurationError
from searchr1_async.rollout.workers.messages import DropPolicy, HoldPolicy, Sampler
from searchr1_async.rollout.workers.samplers import Sendable, newest, sampler_of


@dataclass(slots=True)
class Shared:
    """One policy that groups play with. It is kept here, so no other object gets its identity."""

    number: int
    policy: object
    weights: Sendable
    """Those of ``sampler``."""
    sampler: Sampler
    users: int = 0
    """Groups under way."""


@dataclass(slots=True)
class PolicyBook:
    """What each worker is told, and when.

    A policy that nobody plays is still kept while it is the newest: the next group is likely to play it.
    """

    describe: Callable[[Sendable], Sampler] = sampler_of
    _shared: dict[int, Shared] = field(default_factory=dict)
    """By the policy's identity, oldest first."""
    _told: dict[int, dict[int, Sendable]] = field(default_factory=dict)
    """For each worker, the weights that it has of each policy's number."""
    _numbers: int = 0

    def begin(self, policy: object) -> Shared:
        """A group is to be played with a policy; every call wants its :meth:`end`.

        Raises:
            ConfigurationError: a policy that cannot be sent to another process.
        """
        shared = self._shared.get(id(policy))
        if shared is None:
            weights = newest(policy)
            if weights is None:
                raise ConfigurationError(
                    f"a {type(policy).__name__} cannot be sent to rollout workers: only policies of a Tinker sampling "
                    "client can; play it with workers=1"
                )
            shared = Shared(self._numbers, policy, weights, self.describe(weights))
            self._shared[id(policy)] = shared
            self._numbers += 1
        shared.users += 1
        return shared

    def end(self, shared: Shared) -> dict[int, list[DropPolicy]]:
        """A group is over; the messages for each worker, by its number."""
        shared.users -= 1
        unused = [other for other in list(self._shared.values())[:-1] if not other.users]
        for other in unused:
            del self._shared[id(other.policy)]
        return {
            worker: drops
            for worker, told in self._told.items()
            if (drops := [DropPolicy(other.number) for other in unused if told.pop(other.number, None) is not None])
        }

    def introduce(self, worker: int, shared: Shared) -> list[HoldPolicy]:
        """What a worker must hear before it plays with a policy."""
        self._follow(shared)
        told = self._told.setdefault(worker, {})
        if told.get(shared.number) is shared.weights:
            return []
        told[shared.number] = shared.weights
        return [HoldPolicy(shared.number, shared.sampler)]

    def follow(self, worker: int) -> list[HoldPolicy]:
        """What a worker must hear of policies that have switched their weights: before any turn that it may begin now."""
        told = self._told.get(worker, {})
        return [
            message
            for shared in self._shared.values()
            if shared.number in told
            for message in self.introduce(worker, shared)
        ]

    def forget(self, worker: int) -> None:
        """The worker is gone."""
        self._told.pop(worker, None)

    def held_by(self, worker: int) -> Iterable[int]:
        """The numbers of the policies that a worker holds."""
        return self._told.get(worker, {}).keys()

    def _follow(self, shared: Shared) -> None:
        if getattr(shared.policy, "current", shared.policy) is shared.weights:
            return  # asked before every answer to a search: quick where nothing has changed
        weights = newest(shared.policy)
        if weights is not None:
            shared.sampler, shared.weights = self.describe(weights), weights
