"""The gate in virtual time: priorities, cancellation in every interleaving, and its use of the limit."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.billing import TokenUsage
from searchr1_async.local.process import Latency
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.rollout.event_loop import PulseReading
from searchr1_async.rollout.gate import SampleGate, gate_metrics
from searchr1_async.rollout.limit import Cause, LimitSettings, SampleLimit
from tests.local.serving import sdk, service_thread, successors
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


def now() -> float:
    return asyncio.get_running_loop().time()


def gate_of(places: int, **more: Any) -> SampleGate:
    """A gate with a fixed number of places."""
    return SampleGate(SampleLimit(LimitSettings(first=places, least=places, most=places)), clock=now, **more)


def is_empty(gate: SampleGate) -> bool:
    statistics = gate.statistics
    return (statistics.in_flight, statistics.requests, statistics.waiting) == (0, 0, 0)


async def settled() -> None:
    """Waits until every task sleeps."""
    await anyio.sleep(1e-6)


async def test_those_that_wait_are_let_in_later_turns_first_then_longer_prompts_then_first_come() -> None:
    gate, order = gate_of(1), []

    async def request(name: str, turn: int, tokens: int) -> None:
        async with gate.slot(turn=turn, tokens=tokens):
            order.append(name)
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        for name, turn, tokens in (
            ("at once", 0, 5),
            ("first turn", 0, 10),
            ("first turn, later", 0, 10),
            ("short", 2, 100),
            ("long", 2, 300),
            ("middle", 1, 900),
        ):
            tasks.start_soon(request, name, turn, tokens)
            await settled()
        assert gate.statistics.waiting == 5
    assert order == ["at once", "long", "short", "middle", "first turn", "first turn, later"]
    assert is_empty(gate)


async def test_those_that_yield_are_let_in_behind_all_others_and_get_through_when_nobody_else_waits() -> None:
    gate, order = gate_of(1), []

    async def request(name: str, turn: int, yields: bool) -> None:
        async with gate.slot(turn=turn, yields=yields):
            order.append(name)
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        for name, turn, yields in (
            ("yields, with nobody there", 0, True),
            ("yields, first turn", 0, True),
            ("yields, late turn", 4, True),
            ("first turn", 0, False),
            ("second turn", 1, False),
        ):
            tasks.start_soon(request, name, turn, yields)
            await settled()
    assert order == [
        "yields, with nobody there",
        "second turn",
        "first turn",
        "yields, late turn",
        "yields, first turn",
    ]
    assert is_empty(gate)


async def test_a_large_request_that_yields_holds_up_nobody_who_does_not() -> None:
    gate, began = gate_of(4), {}

    async def request(name: str, samples: int, yields: bool) -> None:
        async with gate.slot(samples=samples, yields=yields):
            began[name] = round(now() - start)
            await anyio.sleep(3)

    start = now()
    async with anyio.create_task_group() as tasks:
        for name, samples, yields in (("first", 2, False), ("large, yields", 4, True), ("single", 1, False)):
            tasks.start_soon(request, name, samples, yields)
            await settled()
    assert began == {"first": 0, "single": 0, "large, yields": 3}


async def test_a_group_takes_as_many_places_as_samples_and_nothing_overtakes_it() -> None:
    gate, began = gate_of(10), {}

    async def request(name: str, samples: int, turn: int, seconds: float) -> None:
        async with gate.slot(samples=samples, turn=turn):
            began[name] = now() - start
            await anyio.sleep(seconds)

    start = now()
    async with anyio.create_task_group() as tasks:
        for name, samples, turn, seconds in (
            ("group", 8, 0, 4.0),
            ("single", 1, 0, 1.0),
            ("next group", 8, 0, 1.0),
            ("late single", 1, 0, 1.0),
            ("second turn", 1, 1, 1.0),
        ):
            tasks.start_soon(request, name, samples, turn, seconds)
            await settled()
    assert {name: round(seconds) for name, seconds in began.items()} == {
        "group": 0,
        "single": 0,
        "second turn": 0,  # a later turn goes before the waiting group
        "next group": 4,
        "late single": 4,
    }


async def test_a_request_that_never_finds_as_many_places_goes_alone() -> None:
    gate = gate_of(4)
    async with gate.slot(samples=8):
        with anyio.move_on_after(100) as scope:
            async with gate.slot():
                raise AssertionError("there was no room")
    assert scope.cancelled_caught
    assert is_empty(gate)


async def test_cancelling_what_stands_in_front_lets_in_what_waits_behind() -> None:
    gate = gate_of(8)
    async with gate.slot(samples=4):
        async with anyio.create_task_group() as tasks:
            front = anyio.CancelScope()

            async def group() -> None:
                with front:
                    async with gate.slot(samples=8, turn=1):
                        raise AssertionError("there was no room")

            async def single() -> None:
                async with gate.slot():
                    tasks.cancel_scope.cancel()

            tasks.start_soon(group)
            await settled()
            tasks.start_soon(single)
            await settled()
            assert gate.statistics.waiting == 9
            with anyio.fail_after(10):
                front.cancel()
                await anyio.sleep_forever()
        assert gate.statistics.in_flight == 4
    assert is_empty(gate)


async def test_a_place_given_to_one_that_is_cancelled_at_that_moment_is_passed_on() -> None:
    gate = gate_of(1)
    let_in: list[str] = []

    async def request(name: str) -> None:
        async with gate.slot():
            let_in.append(name)

    slot = gate.slot()
    await slot.__aenter__()
    chosen, following = (asyncio.create_task(request(name)) for name in ("chosen", "following"))
    await settled()
    await slot.__aexit__(None, None, None)
    assert gate.statistics.in_flight == 1, "the admitted request has its place, but has not run yet"
    chosen.cancel()
    await asyncio.wait([chosen, following], timeout=10)
    assert chosen.cancelled()
    assert let_in == ["following"]
    assert is_empty(gate)


EVENT = st.fixed_dictionaries(
    {
        "at": st.integers(0, 12),
        "samples": st.sampled_from([1, 1, 1, 3, 8, 20]),
        "turn": st.integers(0, 3),
        "tokens": st.integers(0, 3),
        "yields": st.booleans(),
        "seconds": st.integers(0, 5),
        "cancelled_after": st.none() | st.integers(0, 8),
        "cancelled_as": st.sampled_from(["scope", "task"]),
        "fails": st.booleans(),
    }
)


@given(events=st.lists(EVENT, min_size=1, max_size=25), places=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_in_every_interleaving_nothing_is_lost_and_nothing_overtakes(events: list[dict[str, Any]], places: int) -> None:
    with asyncio.Runner(debug=True, loop_factory=VirtualTimeLoop) as runner:
        runner.run(_check(events, places))


@dataclass
class Request:
    """One request in virtual time."""

    key: tuple[bool, int, int, int]
    asked: float = math.inf
    entered: float = math.inf
    left: float = math.inf
    """Time of leaving the gate or its queue."""


async def _check(events: list[dict[str, Any]], places: int) -> None:
    gate = gate_of(places)
    requests: list[Request] = []
    inside: dict[int, int] = {}
    numbers = itertools.count()

    async def request(event: dict[str, Any]) -> None:
        await anyio.sleep(event["at"])
        number = next(numbers)
        mine = Request((event["yields"], -event["turn"], -event["tokens"], number), asked=now())
        requests.append(mine)
        try:
            asked = {name: event[name] for name in ("samples", "turn", "tokens", "yields")}
            async with gate.slot(**asked):
                mine.entered = now()
                inside[number] = event["samples"]
                try:
                    assert sum(inside.values()) <= places or len(inside) == 1
                    assert sum(inside.values()) <= gate.statistics.in_flight
                    await anyio.sleep(event["seconds"])
                    if event["fails"]:
                        raise RuntimeError("the service failed it")
                finally:
                    del inside[number]
        except RuntimeError:
            assert event["fails"]
        finally:
            mine.left = now()

    async def scoped(event: dict[str, Any]) -> None:
        after, kind = event["cancelled_after"], event["cancelled_as"]
        if after is None or kind == "scope":
            with anyio.move_on_after(None if after is None else event["at"] + after):
                await request(event)
            return
        task = asyncio.create_task(request(event))
        await asyncio.wait([task], timeout=event["at"] + after)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    with anyio.fail_after(1000):
        async with anyio.create_task_group() as tasks:
            for event in events:
                tasks.start_soon(scoped, event)
    assert is_empty(gate)
    for one in requests:
        for other in requests:
            waited_before = other.asked < one.entered < min(other.entered, other.left)
            assert not (waited_before and other.key < one.key), f"{one} overtook {other}"
    async with gate.slot(samples=places):
        pass


async def test_it_counts_what_went_through() -> None:
    gate = gate_of(8)
    async with gate.slot(samples=2, tokens=100) as slot:
        slot.finished([3, 4], 64)
    with pytest.raises(RuntimeError):
        async with gate.slot(samples=4, tokens=10):
            raise RuntimeError("the service failed it")
    with anyio.move_on_after(1):
        async with gate.slot(tokens=1):
            await anyio.sleep_forever()
    statistics = gate.statistics
    # A prompt is read once and cached for the other samples; sent requests count, answered or not.
    assert statistics.usage == TokenUsage(prompt=2 * 100 + 4 * 10 + 1, cached=64 + 100 + 3 * 10, sampled=7)
    assert (statistics.samples, statistics.usage.sampled, statistics.failed) == (2, 7, 4)
    assert statistics.cause is Cause.WORK
    assert gate_metrics([statistics])["rollout/limited_by/work"] == 1.0
    assert is_empty(gate)


async def test_the_limit_grows_by_what_comes_back_while_others_wait() -> None:
    gate = SampleGate(SampleLimit(LimitSettings(first=8, most=64)), clock=now)

    async def request() -> None:
        async with gate.slot():
            await anyio.sleep(1)

    began = now()
    async with anyio.create_task_group() as tasks:
        for _ in range(8 + 16 + 32 + 64):
            tasks.start_soon(request)
        await settled()
        assert gate.statistics.cause is Cause.GROWING
    assert now() - began == pytest.approx(4.0, abs=0.01), "8, 16, 32 and 64 at once"


async def test_a_saturated_process_holds_the_limit() -> None:
    gate = gate_of(8)
    gate.client_is(PulseReading(1.0, 0.001, 0.002, 0.003, cpu=0.95))
    assert gate.statistics.cause is Cause.CLIENT


def test_the_way_through_costs_microseconds_where_there_is_room() -> None:
    """Relative to one event loop iteration, of which every request takes many."""
    passes, turns = 2000, 2000

    async def measure() -> tuple[float, float]:
        gate = SampleGate()
        best_pass = best_turn = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(passes):
                async with gate.slot(turn=1, tokens=300) as slot:
                    slot.finished([5])
            middle = time.perf_counter()
            for _ in range(turns):
                await asyncio.sleep(0)
            best_pass = min(best_pass, (middle - began) / passes)
            best_turn = min(best_turn, (time.perf_counter() - middle) / turns)
        return best_pass, best_turn

    a_pass, a_turn = asyncio.run(measure())
    assert a_pass < 10 * a_turn


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"debug": True})])
async def test_it_sees_a_service_push_back_through_the_sdk(tmp_path: Path) -> None:
    """The SDK hides "too many requests"; the limit falls anyway, and everything is sampled."""
    gate = SampleGate(SampleLimit(LimitSettings(first=32, least=2, most=32)))
    backend = ScriptedBackend(successors, latency=Latency(floor=0.2))
    with service_thread(tmp_path, backend, max_samples=8) as served:
        async with sdk(served.url) as service:
            client = await service.create_sampling_client(base_model="scripted")
            gate.watch(client)
            prompt = tinker.types.ModelInput.from_ints([5, 6, 7])

            async def one() -> None:
                async with gate.slot() as slot:
                    response = await client.sample(prompt, 1, tinker.types.SamplingParams(max_tokens=8))
                    slot.finished([len(response.sequences[0].tokens)])

            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    for _ in range(24):
                        tasks.start_soon(one)
    statistics = gate.statistics
    assert statistics.samples == 24
    assert statistics.push_backs >= 1
    assert statistics.limit <= 0.7 * 24
    assert statistics.cause is Cause.SERVICE


async def test_a_paused_gate_lets_nobody_in_and_then_goes_on_in_order() -> None:
    gate, order = gate_of(2), []

    async def request(name: str, turn: int) -> None:
        async with gate.slot(turn=turn, tokens=10):
            order.append(name)
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(request, "on its way", 0)
        await settled()
        gate.pause(True)
        for name, turn in (("first turn", 0), ("later turn", 1), ("latest turn", 3)):
            tasks.start_soon(request, name, turn)
        await settled()
        with anyio.move_on_after(0.1):
            await request("given up", 2)
        await anyio.sleep(3600)
        assert order == ["on its way"], "requests in flight finished, and nothing started"
        assert (gate.statistics.in_flight, gate.statistics.waiting, gate.statistics.is_paused) == (0, 3, True)
        gate.pause(False)
        await settled()
        assert order[1:] == ["latest turn", "later turn"]
        assert not gate.statistics.is_paused
    assert order[-1] == "first turn"
    assert gate.statistics.usage.prompt == 40
    assert is_empty(gate)
