"""Private interfaces of the SDK: back-pressure that it hides, and what happens when one is missing."""

from __future__ import annotations

import gc
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinker
from tinker.lib.api_future_impl import QueueState, QueueStateObserver

from searchr1_async.boundary import compat
from searchr1_async.boundary.compat import PushBackProbe
from tests.local.serving import KEY, sdk, service_thread


class Holder:
    def __init__(self) -> None:
        self._sample_backoff_until: float | None = None


class Client(QueueStateObserver):
    def __init__(self, holder: Any) -> None:
        self.holder = holder
        self.heard: list[QueueState] = []

    def on_queue_state_change(self, queue_state: QueueState, queue_state_reason: str | None) -> None:
        self.heard.append(queue_state)

    def __reduce__(self) -> Any:
        return (Client, (None,))


def test_a_back_off_is_seen_once_and_by_whichever_client() -> None:
    holder, probe = Holder(), PushBackProbe()
    clients = [Client(holder), Client(holder)]
    for client in clients:
        probe.watch(client)
    assert not probe.take()
    holder._sample_backoff_until = 12.5
    assert probe.take()
    assert not probe.take()
    holder._sample_backoff_until = 14.0
    assert probe.take()


def test_one_from_before_it_was_watched_does_not_count() -> None:
    holder, probe = Holder(), PushBackProbe()
    holder._sample_backoff_until = 12.5
    client = Client(holder)
    probe.watch(client)
    assert not probe.take()


def test_a_service_short_of_capacity_is_heard_and_the_client_hears_it_too() -> None:
    probe, client = PushBackProbe(), Client(Holder())
    probe.watch(client)
    probe.watch(client)
    for state in (QueueState.ACTIVE, QueueState.PAUSED_RATE_LIMIT):
        client.on_queue_state_change(state, None)
        assert not probe.take()
    client.on_queue_state_change(QueueState.PAUSED_CAPACITY, "short")
    assert probe.take()
    assert not probe.take()
    assert client.heard == [QueueState.ACTIVE, QueueState.PAUSED_RATE_LIMIT, QueueState.PAUSED_CAPACITY]


def test_a_watched_client_is_freed_at_once_and_can_be_sent_to_another_process() -> None:
    probe, holder = PushBackProbe(), Holder()
    client = Client(holder)
    probe.watch(client)
    assert isinstance(pickle.loads(pickle.dumps(client)), Client)
    gone = weakref.ref(client)
    gc.disable()
    try:
        del client
        assert gone() is None
    finally:
        gc.enable()
    del holder
    assert not probe.take()


@pytest.mark.parametrize(
    "client",
    [object(), SimpleNamespace(), SimpleNamespace(holder=None), SimpleNamespace(holder=object()), Client(object())],
    ids=["bare", "no holder", "None", "a holder that cannot be referred to", "a holder without the field"],
)
def test_what_is_missing_is_done_without(client: Any) -> None:
    probe = PushBackProbe()
    probe.watch(client)
    assert not probe.take()


@pytest.mark.anyio
async def test_this_version_of_the_sdk_has_all_that_is_used(tmp_path: Path) -> None:
    """Fails when a new version of the SDK drops something; the engine keeps working without it."""
    with service_thread(tmp_path) as served:
        async with sdk(served.url) as service:
            client = await service.create_sampling_client(base_model="scripted")
            assert compat.missing(client) == [], f"tinker {tinker.__version__} dropped a private interface"
            assert compat.api_key_of(client) == KEY
            assert compat.address_of(service) == served.url
            handle, session = compat.with_shared_connections(client.get_sampler_handle(), {})
            assert session == (client.holder.get_session_id(), served.url)
            assert tinker.SamplingClient.from_sampler_handle(handle, api_key=KEY).get_base_model() == "scripted"
            await compat.cancellations_sent(client)


def test_what_the_sdk_lacks_is_logged_once_per_session(caplog: pytest.LogCaptureFixture) -> None:
    probe, holder = PushBackProbe(), Holder()
    for client in (Client(holder), Client(holder)):
        probe.watch(client)
    lacking = [record.getMessage() for record in caplog.records]
    assert len(lacking) == 5
    assert any("shadow_config.api_key: samplers cannot be sent to other processes" in text for text in lacking)
