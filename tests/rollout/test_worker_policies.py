"""A worker's policies under every order of groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.config import SamplingSettings
from searchr1_async.errors import ConfigurationError, ServiceError
from searchr1_async.rollout.player import Sampler, TinkerPolicy
from searchr1_async.rollout.worker import UnopenedPolicy, WorkerPolicies

Step = tuple[str, int]
steps = st.lists(st.tuples(st.sampled_from(["begin", "begin", "end"]), st.integers(0, 40)), max_size=60)


def sampler(version: int) -> Sampler:
    return Sampler(f"handle {version}", None, version, SamplingSettings(seed=1))


class Client: ...


@given(steps)
@settings(max_examples=60, deadline=None)
def test_what_is_played_is_kept_and_the_rest_dropped_but_for_the_newest(steps: list[Step]) -> None:
    clients: WeakValueDictionary[int, Client] = WeakValueDictionary()
    """Those that are kept, by version."""
    groups: list[Sampler] = []
    newest = 0

    def open_client(sampler: Sampler) -> Any:
        assert sampler.version not in clients, "opened twice"
        client = clients[sampler.version] = Client()
        return client

    async def main() -> None:
        nonlocal newest
        policies = WorkerPolicies(open_client)
        for action, number in steps:
            if action == "begin":
                # Also policies of a while ago: a group that is retried uses the one that it began with.
                wanted = sampler(newest + 1 - number % 4)
                newest = max(newest, wanted.version)
                policy = await policies.use(wanted)
                assert getattr(policy, "version", None) == wanted.version
                del policy
                groups.append(wanted)
            elif groups:
                policies.release(groups.pop(number % len(groups)))
            played = {each.version for each in groups}
            assert played <= set(clients)
            assert len(set(clients) - played) <= 1

    anyio.run(main)


def test_a_policy_that_cannot_be_opened_fails_its_samples() -> None:
    def open_client(sampler: Sampler) -> Any:
        raise ServiceError("no credentials")

    policy = anyio.run(WorkerPolicies(open_client).use, sampler(1))
    assert isinstance(policy, UnopenedPolicy)
    assert str(policy.error) == "no credentials"


def test_a_policy_is_described_once_since_its_handle_changes_with_time() -> None:
    handles = iter(["first", "second"])
    holder = SimpleNamespace(shadow_config=SimpleNamespace(api_key="tml-key"))
    client: Any = SimpleNamespace(get_sampler_handle=lambda: next(handles), holder=holder)
    policy = TinkerPolicy(client, 3, SamplingSettings(seed=1))
    assert policy.sampler == policy.sampler == Sampler("first", "tml-key", 3, SamplingSettings(seed=1))


def test_a_client_without_a_handle_is_refused() -> None:
    client: Any = SimpleNamespace()
    with pytest.raises(ConfigurationError, match=r"cannot be sent to other processes .*workers=1"):
        _ = TinkerPolicy(client, 0, SamplingSettings()).sampler
