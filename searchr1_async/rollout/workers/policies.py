"""Which policies the workers hold: each is sent to a worker once, and dropped when nobody plays it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from searchr1_async.errors import ConfigurationError
from searchr1_async.rollout.workers.messages import DropPolicy, HoldPolicy, Sampler
from searchr1_async.rollout.workers.samplers import Sendable, sampler_of


@dataclass(slots=True)
class Shared:
    """One policy that groups play with. It is kept here, so no other object gets its identity."""

    number: int
    policy: object
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
    _told: dict[int, set[int]] = field(default_factory=dict)
    """For each worker, the numbers of the policies that it holds."""
    _numbers: int = 0

    def begin(self, policy: object) -> Shared:
        """A group is to be played with a policy; every call wants its :meth:`end`.

        Raises:
            ConfigurationError: a policy that cannot be sent to another process.
        """
        shared = self._shared.get(id(policy))
        if shared is None:
            if not isinstance(policy, Sendable):
                raise ConfigurationError(
                    f"a {type(policy).__name__} cannot be sent to rollout workers: only policies of a Tinker sampling "
                    "client can; play it with workers=1"
                )
            shared = Shared(self._numbers, policy, self.describe(policy))
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
        dropped = {other.number for other in unused}
        messages: dict[int, list[DropPolicy]] = {}
        for worker, told in self._told.items():
            if gone := told & dropped:
                told -= gone
                messages[worker] = [DropPolicy(number) for number in sorted(gone)]
        return messages

    def introduce(self, worker: int, shared: Shared) -> list[HoldPolicy]:
        """What a worker must hear before it plays with a policy."""
        told = self._told.setdefault(worker, set())
        if shared.number in told:
            return []
        told.add(shared.number)
        return [HoldPolicy(shared.number, shared.sampler)]

    def forget(self, worker: int) -> None:
        """The worker is gone."""
        self._told.pop(worker, None)
