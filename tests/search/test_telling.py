"""Waits for a service are bounded and reported once, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.boundary.waits import REPORT_AFTER
from searchr1_async.errors import ConfigurationError, SearchError, SearchUnavailableError
from searchr1_async.search.dispatch import Dispatcher
from searchr1_async.search.faults import PassingFault, TooManyRequests
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.retries import Capacity
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio

DAY = 86_399.0


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Service:
    """Fails with the given faults, then answers."""

    faults: list[PassingFault | None]
    times: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    told_at: list[float] = field(default_factory=list)

    async def send(self, texts: Sequence[str]) -> Sequence[str]:
        self.times.append(now())
        number = len(self.times) - 1
        if number < len(self.faults) and (fault := self.faults[number]) is not None:
            raise fault
        return [text.upper() for text in texts]

    def tell(self, text: str) -> None:
        self.told.append(text)
        self.told_at.append(now())

    def dispatcher(self, **options: Any) -> Dispatcher[str, str, str]:
        capacity, pacing = Capacity(items=1, requests=4), PacingSettings(**options)
        made = Dispatcher(self.send, name="the service", capacity=lambda: capacity, pacing=pacing)
        made.waits.tell = self.tell
        return made


async def ask(dispatcher: Dispatcher[str, str, str], *texts: str) -> dict[str, str]:
    return await dispatcher.fetch({text: text for text in texts})


Fault = Callable[..., PassingFault]


def slower(seconds: float | None) -> PassingFault:
    return TooManyRequests("429: the quota of a day is used up", retry_after=seconds)


def broken(seconds: float | None) -> PassingFault:
    return PassingFault("500: internal", cause="500", retry_after=seconds)


@pytest.mark.parametrize("fault", [slower, broken])
async def test_a_wait_over_the_bound_is_refused_at_once(fault: Fault) -> None:
    service = Service([fault(DAY)])
    began = now()
    with pytest.raises(SearchUnavailableError) as refusal:
        await ask(service.dispatcher(), "a", "b", "c")
    assert now() - began < 1
    assert len(service.times) <= 3
    assert refusal.value.is_fatal
    for words in (
        "the service asks for a wait of 86,399 s, until 20",
        "PacingSettings.longest_wait=300",
        "quota of a day",
    ):
        assert words in str(refusal.value) or fault is broken


@pytest.mark.parametrize("fault", [slower, broken])
async def test_the_bound_is_a_setting(fault: Fault) -> None:
    service = Service([fault(DAY)])
    began = now()
    assert await ask(service.dispatcher(longest_wait=100_000), "a") == {"a": "A"}
    assert DAY <= now() - began < DAY + 60
    assert len(service.times) == 2
    (told,) = service.told
    assert "the service asks to back off" in told
    assert "waiting for at most 86,399 s more, until 20" in told


async def test_requests_that_are_pushed_back_together_are_told_once() -> None:
    service = Service([slower(60.0), slower(61.0), slower(59.0), slower(60.0)])
    assert len(await ask(service.dispatcher(), *"abcdefgh")) == 8
    (told,) = service.told
    assert "waiting for at most 60 s more" in told


async def test_two_waits_are_told_twice_and_a_short_one_not() -> None:
    service = Service([slower(60.0), None, slower(2.0), slower(40.0)])
    dispatcher = service.dispatcher()
    for text in "abcd":
        await ask(dispatcher, text)
    assert len(service.told) == 2


async def test_an_outage_is_told_once_with_its_end_and_when_it_is_over() -> None:
    service = Service([broken(None)] * 12)
    assert await ask(service.dispatcher(max_outage=900), "a", "b", "c") == {"a": "A", "b": "B", "c": "C"}
    first, last = service.told
    assert "the service does not answer (500: internal): waiting for at most" in first
    assert service.told_at[0] - service.times[0] < 3 * REPORT_AFTER
    assert last == "the service answers again"


async def test_without_a_watcher_the_log_tells_what_a_service_asks_for(caplog: pytest.LogCaptureFixture) -> None:
    service = Service([slower(60.0)])
    capacity = Capacity(items=1, requests=4)
    await ask(Dispatcher(service.send, name="the service", capacity=lambda: capacity), "a")
    assert [record.getMessage() for record in caplog.records if "asks to back off" in record.getMessage()]


@pytest.mark.parametrize("value", [0, -1.0])
def test_a_bound_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ConfigurationError, match="longest_wait"):
        PacingSettings(longest_wait=value)


asked = st.one_of(st.none(), st.floats(0, 2 * DAY), st.floats(0, 20))
faults = st.lists(st.one_of(st.none(), st.builds(slower, asked), st.builds(broken, asked)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(faults=faults, longest=st.sampled_from([1.0, 30.0, 300.0, 10_000.0]))
def test_no_wait_is_longer_than_allowed_and_every_long_one_is_told(
    faults: list[PassingFault | None], longest: float
) -> None:
    service = Service(faults)

    async def main() -> None:
        dispatcher = service.dispatcher(longest_wait=longest, longest_pause=4.0, max_outage=50_000, retry_budget=50_000)
        for number in range(14):
            try:
                await ask(dispatcher, str(number))
            except SearchError:
                return

    anyio.run(main, backend="asyncio", backend_options={"loop_factory": VirtualTimeLoop})
    for earlier, later in pairwise(service.times):
        assert later - earlier <= max(longest, 4.0) + 1
        if later - earlier > REPORT_AFTER + 4.0:
            assert any(earlier - REPORT_AFTER <= at <= later for at in service.told_at), (earlier, later)
