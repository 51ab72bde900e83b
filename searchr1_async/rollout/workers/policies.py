"""Tracks which policies each worker has: sent once, dropped when unused. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from searchr1_async.errors import ConfigurationError
from searchr1_async.rollout.workers.messages import DropPolicy, HoldPolicy, Sampler
from searchr1_async.rollout.workers.samplers import Sendable, sampler_of


@dataclass(slots=True)
class Shared:
    """A policy in use. Holding it here keeps its ``id`` unique."""

    number: int
    policy: object
    sampler: Sampler
    users: int = 0
    """Groups in progress."""


@dataclass(slots=True)
class PolicyBook:
    """Decides which policy messages each worker gets.

    The newest policy is kept even when unused, since the next group is likely to use it.
    """

    describe: Callable[[Sendable], Sampler] = sampler_of
    _shared: dict[int, Shared] = field(default_factory=dict)
    """By ``id`` of the policy, oldest first."""
    _sent: dict[int, set[int]] = field(default_factory=dict)
    """Per worker, the numbers of its policies."""
    _numbers: int = 0

    def begin(self, policy: object) -> Shared:
        """Registers a group that uses the policy; each call needs an :meth:`end`.

        Raises:
            ConfigurationError: the policy cannot be sent to workers.
        """
        shared = self._shared.get(id(policy))
        if shared is None:
            if not isinstance(policy, Sendable):
                raise ConfigurationError(
                    f"a {type(policy).__name__} cannot be sent to rollout workers: only policies of a Tinker sampling "
                    "client can; use workers=1"
                )
            shared = Shared(self._numbers, policy, self.describe(policy))
            self._shared[id(policy)] = shared
            self._numbers += 1
        shared.users += 1
        return shared

    def end(self, shared: Shared) -> dict[int, list[DropPolicy]]:
        """Unregisters a group; returns the messages per worker number."""
        shared.users -= 1
        unused = [other for other in list(self._shared.values())[:-1] if not other.users]
        for other in unused:
            del self._shared[id(other.policy)]
        dropped = {other.number for other in unused}
        messages: dict[int, list[DropPolicy]] = {}
        for worker, sent in self._sent.items():
            if gone := sent & dropped:
                sent -= gone
                messages[worker] = [DropPolicy(number) for number in sorted(gone)]
        return messages

    def introduce(self, worker: int, shared: Shared) -> list[HoldPolicy]:
        """Messages that a worker needs before it uses the policy."""
        sent = self._sent.setdefault(worker, set())
        if shared.number in sent:
            return []
        sent.add(shared.number)
        return [HoldPolicy(shared.number, shared.sampler)]

    def forget(self, worker: int) -> None:
        """Forgets a worker that is gone."""
        self._sent.pop(worker, None)
