"""Policy messages under every order of groups and deaths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from searchr1_async.config import SamplingSettings
from searchr1_async.errors import ConfigurationError
from searchr1_async.rollout.workers.messages import DropPolicy, HoldPolicy, Sampler
from searchr1_async.rollout.workers.transfer import PolicyBook, Shared
from searchr1_async.testing import ScriptedPolicy

SETTINGS = SamplingSettings()


@dataclass(eq=False)
class Weights:
    """Stand-in for a Tinker policy."""

    version: int
    client: Any = None
    settings: SamplingSettings = SETTINGS


class Model(RuleBasedStateMachine):
    """Workers that follow messages, and the groups that run on them."""

    @initialize()
    def begin(self) -> None:
        self.described: list[int] = []
        self.book = PolicyBook(self.describe)
        self.versions = 0
        self.policies: list[Any] = []
        self.newest: Any = None
        self.workers: dict[int, dict[int, int]] = {0: {}, 1: {}}
        self.heard: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
        self.groups: list[tuple[int, Shared]] = []
        self.next_worker = 2

    def describe(self, weights: Any) -> Sampler:
        self.described.append(weights.version)
        return Sampler("handle", None, weights.version, weights.settings)

    def weights(self) -> Any:
        self.versions += 1
        return Weights(self.versions)

    def tell(self, worker: int, messages: Any) -> None:
        for message in messages:
            if isinstance(message, HoldPolicy):
                self.workers[worker][message.policy] = message.sampler.version
                self.heard[worker].append((message.policy, message.sampler.version))
            else:
                assert isinstance(message, DropPolicy)
                del self.workers[worker][message.policy]

    @rule()
    def make_policy(self) -> None:
        self.policies.append(self.weights())

    @precondition(lambda self: self.policies)
    @rule(data=st.data())
    def start_group(self, data: st.DataObject) -> None:
        policy = data.draw(st.sampled_from(self.policies))
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        shared = self.book.begin(policy)
        self.tell(worker, self.book.introduce(worker, shared))
        assert self.workers[worker][shared.number] == policy.version
        self.groups.append((worker, shared))

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def end_group(self, data: st.DataObject) -> None:
        _, shared = self.groups.pop(data.draw(st.integers(0, len(self.groups) - 1)))
        for worker, messages in self.book.end(shared).items():
            self.tell(worker, messages)

    @rule(data=st.data())
    def lose_a_worker(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        del self.workers[worker]
        self.book.forget(worker)
        self.workers[self.next_worker], self.heard[self.next_worker] = {}, []
        # Its groups are retried on other workers, which get the policy.
        for place, (where, shared) in enumerate(self.groups):
            if where == worker:
                self.groups[place] = (self.next_worker, shared)
                self.tell(self.next_worker, self.book.introduce(self.next_worker, shared))
        self.next_worker += 1

    @invariant()
    def what_is_played_is_held(self) -> None:
        for worker, shared in getattr(self, "groups", ()):
            assert shared.number in self.workers[worker]

    @invariant()
    def nothing_is_sent_or_described_twice(self) -> None:
        for heard in getattr(self, "heard", {}).values():
            assert len(heard) == len(set(heard))

    @invariant()
    def what_nobody_plays_is_dropped_but_for_one(self) -> None:
        if getattr(self, "groups", None) is None:
            return
        played = {shared.number for _, shared in self.groups}
        for held in self.workers.values():
            assert len(set(held) - played) <= 1


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_policy_of_no_service_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="ScriptedPolicy cannot be sent"):
        PolicyBook().begin(ScriptedPolicy(lambda prompt: ()))
