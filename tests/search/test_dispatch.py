"""The dispatcher against a scripted service, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.errors import SearchError, SearchUnavailableError, StoreError
from searchr1_async.search.dispatch import Dispatcher
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.retries import Capacity, Deadline
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Service:
    """Answers a text with its upper case after ``seconds``; ``before`` scripts each request."""

    seconds: float = 0.1
    before: Callable[[int, Sequence[str]], Awaitable[None]] | None = None
    capacity: Capacity = field(default_factory=lambda: Capacity(items=10, requests=8))
    batches: list[list[str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    async def send(self, texts: Sequence[str]) -> Sequence[str]:
        number = len(self.batches)
        self.batches.append(list(texts))
        self.times.append(now())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.before is not None:
                await self.before(number, texts)
            await anyio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        return [text.upper() for text in texts]

    def dispatcher(self, **options: Any) -> Dispatcher[str, str, str]:
        pacing = PacingSettings(**options)
        return Dispatcher(
            self.send, name="the service", capacity=lambda: self.capacity, pacing=pacing, failure=StoreError
        )


async def ask(dispatcher: Dispatcher[str, str, str], *texts: str, deadline: float | None = None) -> dict[str, str]:
    return await dispatcher.fetch({text: text for text in texts}, None if deadline is None else Deadline(deadline))


def failing(*faults: SearchError | None) -> Callable[[int, Sequence[str]], Awaitable[None]]:
    """The n-th request fails with the n-th fault; the last fault repeats."""

    async def before(number: int, texts: Sequence[str]) -> None:
        fault = faults[min(number, len(faults) - 1)]
        if fault is not None:
            raise fault

    return before


RESET = PassingFault("the line broke", cause="reset")


async def test_those_who_ask_in_one_turn_of_the_loop_go_out_together() -> None:
    service = Service()
    dispatcher = service.dispatcher()
    answers = await asyncio.gather(*(ask(dispatcher, f"q{number}") for number in range(8)))
    assert answers == [{f"q{number}": f"Q{number}"} for number in range(8)]
    assert [len(batch) for batch in service.batches] == [8]
    statistics = dispatcher.statistics
    assert (statistics.requests, statistics.texts, statistics.in_flight, statistics.waiting) == (1, 8, 0, 0)
    assert statistics.latency.quantile(0.5) == pytest.approx(0.1, rel=0.06)


async def test_a_lone_one_waits_for_nobody() -> None:
    service = Service()
    began = now()
    assert await ask(service.dispatcher(), "a") == {"a": "A"}
    assert now() - began == pytest.approx(0.1)


async def test_nothing_asked_is_nothing_sent() -> None:
    service = Service()
    assert await ask(service.dispatcher()) == {}
    assert service.batches == []


async def test_what_comes_while_all_slots_are_taken_gathers() -> None:
    service = Service()
    dispatcher = service.dispatcher(first_limit=2)

    async def one(number: int) -> None:
        await anyio.sleep(number * 0.001)
        await ask(dispatcher, f"q{number}")

    async with anyio.create_task_group() as tasks:
        for number in range(12):
            tasks.start_soon(one, number)
    assert [len(batch) for batch in service.batches] == [1, 1, 10]
    assert service.most_at_once == 2


async def test_under_load_batches_grow_and_nobody_waits_for_long() -> None:
    service = Service(capacity=Capacity(items=100, requests=16))
    dispatcher = service.dispatcher()
    generator = random.Random(0)

    async def one(number: int) -> None:
        await anyio.sleep(generator.random() * 5)
        await ask(dispatcher, f"q{number}")

    async with anyio.create_task_group() as tasks:
        for number in range(500):
            tasks.start_soon(one, number)
    statistics = dispatcher.statistics
    assert statistics.mean_batch > 3.3, "500 in 5 s, each taking 0.1 s: 10 are in flight at any time, by 2.6 requests"
    assert statistics.latency.quantile(1) < 0.12


async def test_a_call_with_many_shares_the_batches_with_those_after_it() -> None:
    service = Service(capacity=Capacity(items=5, requests=1))
    dispatcher = service.dispatcher(first_limit=1)
    done: list[str] = []

    async def one(*texts: str) -> None:
        await ask(dispatcher, *texts)
        done.append(texts[0])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one, *(f"many{number}" for number in range(20)))
        for number in range(4):
            tasks.start_soon(one, f"single{number}")
    assert done[-1] == "many0"
    assert set(service.batches[0]) == {"many0", "single0", "single1", "single2", "single3"}


async def test_more_requests_at_once_only_while_whole_batches_wait() -> None:
    service = Service(capacity=Capacity(items=1, requests=32))
    dispatcher = service.dispatcher()
    await asyncio.gather(*(ask(dispatcher, f"q{number}") for number in range(150)))
    assert service.most_at_once == 32
    assert dispatcher.statistics.limit == 32
    few = Service(capacity=Capacity(items=100, requests=32))
    dispatcher = few.dispatcher()
    for _ in range(20):
        await asyncio.gather(*(ask(dispatcher, f"q{number}") for number in range(50)))
    assert few.most_at_once <= 4


async def test_a_passing_fault_is_tried_again_and_the_others_do_not_wait_for_it() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if "bad" in texts and number < 3:
            raise PassingFault("down", cause="503")

    service = Service(before=before)
    dispatcher = service.dispatcher(first_pause=30.0, longest_pause=100.0)
    took: dict[str, float] = {}

    async def one(text: str, delay: float) -> None:
        await anyio.sleep(delay)
        began = now()
        await ask(dispatcher, text)
        took[text] = now() - began

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one, "bad", 0)
        for number in range(50):
            tasks.start_soon(one, f"q{number}", 0.05 + number / 100)
    assert all(seconds < 0.25 for text, seconds in took.items() if text != "bad")
    assert service.most_at_once <= 4
    assert dispatcher.statistics.faults["503"] >= 1


async def test_too_many_requests_slows_everyone_down_for_as_long_as_asked() -> None:
    service = Service(
        before=failing(TooManyRequests("slower", retry_after=60.0), None), capacity=Capacity(items=1, requests=16)
    )
    dispatcher = service.dispatcher(first_limit=1)
    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(ask, dispatcher, f"q{number}")
    first, *others = service.times
    assert all(time - first >= 60.0 for time in others)
    assert others[0] - first == pytest.approx(60.0, abs=0.01)
    assert sorted(Counter(text for batch in service.batches for text in batch).values()) == [1, 1, 1, 1, 2]
    assert dict(dispatcher.statistics.faults) == {"429": 1}


async def test_too_many_requests_without_a_time_halves_and_pauses_longer_each_time() -> None:
    service = Service(before=failing(*[TooManyRequests("slower")] * 6, None), capacity=Capacity(items=1, requests=16))
    await ask(service.dispatcher(first_pause=1.0), "a")
    pauses = [later - earlier for earlier, later in zip(service.times, service.times[1:], strict=False)]
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 20])


async def test_a_fault_for_good_reaches_exactly_those_who_asked() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if number == 0:
            raise StoreError("no such collection", is_fatal=True)

    service = Service(before=before)
    dispatcher = service.dispatcher()
    outcomes = await asyncio.gather(ask(dispatcher, "a"), ask(dispatcher, "b"), return_exceptions=True)
    assert all(isinstance(outcome, StoreError) and outcome.is_fatal for outcome in outcomes)
    assert outcomes[0] is not outcomes[1]
    assert len(service.batches) == 1
    assert await ask(dispatcher, "a") == {"a": "A"}


async def test_one_refused_item_fails_alone() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if "poison" in texts:
            raise RefusedInput("one of these cannot be read")

    service = Service(before=before)
    dispatcher = service.dispatcher()
    texts = [f"q{number}" for number in range(9)] + ["poison"]
    outcomes = await asyncio.gather(*(ask(dispatcher, text) for text in texts), return_exceptions=True)
    assert [isinstance(outcome, StoreError) for outcome in outcomes] == [False] * 9 + [True]
    assert "cannot be read" in str(outcomes[-1])


async def test_a_service_that_turns_out_to_refuse_lists_gets_single_items() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if len(texts) > 1:
            service.capacity = Capacity(items=1, requests=8)
            raise RefusedInput("one at a time")

    service = Service(before=before)
    dispatcher = service.dispatcher()
    await asyncio.gather(*(ask(dispatcher, f"q{number}") for number in range(10)))
    assert [len(batch) for batch in service.batches] == [10] + [1] * 10
    assert service.most_at_once > 1


async def test_a_wrong_number_of_answers_is_never_paired() -> None:
    service = Service()

    async def send(texts: Sequence[str]) -> Sequence[str]:
        answers = list(await service.send(texts))
        return answers[:-1] if len(service.batches) < 3 else answers

    dispatcher = Dispatcher(send, name="s", capacity=lambda: service.capacity)
    assert await ask(dispatcher, "a", "b") == {"a": "A", "b": "B"}
    assert dict(dispatcher.statistics.faults) == {"malformed": 2}


async def test_the_deadline() -> None:
    service = Service(seconds=20)
    dispatcher = service.dispatcher()
    with pytest.raises(StoreError, match=r"the service within 5 s"):
        await ask(dispatcher, "a", deadline=5)
    assert dispatcher.statistics.in_flight == 0
    service.seconds = 1
    assert await ask(dispatcher, "a", deadline=5) == {"a": "A"}


async def test_a_request_that_hangs_is_tried_again() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if number == 0:
            await anyio.sleep_forever()

    service = Service(before=before)
    dispatcher = service.dispatcher(request_timeout=7)
    began = now()
    assert await ask(dispatcher, "a") == {"a": "A"}
    assert 7 < now() - began < 8
    assert dict(dispatcher.statistics.faults) == {"timeout": 1}


async def test_the_retries_of_one_batch_end() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if "bad" in texts:
            raise RESET

    service = Service(before=before)
    dispatcher = service.dispatcher(retry_budget=20, first_limit=2)
    outcome: list[Exception] = []

    async def bad() -> None:
        try:
            await ask(dispatcher, "bad")
        except SearchError as error:
            outcome.append(error)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bad)
        await anyio.sleep(0.01)
        while True:  # others are answered meanwhile, so the service is not down
            await ask(dispatcher, "good")
    (failure,) = outcome
    assert type(failure) is StoreError
    assert "kept failing" in str(failure)
    assert failure.__cause__ is RESET


async def test_a_batch_that_fails_while_others_are_answered_is_split() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if "bad" in texts:
            raise RESET

    service = Service(before=before)
    dispatcher = service.dispatcher(retry_budget=20)
    outcomes: dict[str, Any] = {}

    async def one(text: str) -> None:
        began = now()
        try:
            await ask(dispatcher, text)
            outcomes[text] = now() - began
        except StoreError as error:
            outcomes[text] = error

    async def others() -> None:
        while len(outcomes) < 10:
            await ask(dispatcher, "other")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        await anyio.sleep(0.01)
        for text in ("bad", *(f"q{number}" for number in range(9))):
            tasks.start_soon(one, text)
    assert isinstance(outcomes.pop("bad"), StoreError)
    assert all(seconds < 8 for seconds in outcomes.values())


async def test_an_outage_is_waited_out_past_every_deadline() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if now() < back_at:
            raise RESET

    service = Service(before=before)
    back_at = now() + 200
    dispatcher = service.dispatcher(max_outage=300)
    async with anyio.create_task_group() as tasks:

        async def one(number: int) -> None:
            await anyio.sleep(number)
            assert await ask(dispatcher, f"q{number}", deadline=10) == {f"q{number}": f"Q{number}"}

        for number in range(100):
            tasks.start_soon(one, number)
    assert 200 < now() - back_at + 200 < 225
    while_down = [time for time in service.times if time < back_at]
    assert len(while_down) < 25
    assert dispatcher.statistics.seconds_down == 0


async def test_an_outage_that_lasts_too_long_ends_all_that_wait() -> None:
    service = Service(before=failing(RESET))
    dispatcher = service.dispatcher(max_outage=100)
    began = now()
    outcomes = await asyncio.gather(
        *(ask(dispatcher, f"q{number}", deadline=10) for number in range(60)), return_exceptions=True
    )
    assert all(isinstance(outcome, SearchUnavailableError) and outcome.is_fatal for outcome in outcomes)
    assert "down for 1" in str(outcomes[0])
    assert 100 < now() - began < 125
    assert dispatcher.statistics.seconds_down > 100
    with pytest.raises(SearchUnavailableError):
        await ask(dispatcher, "later")
    service.before = None
    assert await ask(dispatcher, "back") == {"back": "BACK"}


async def test_who_carries_for_others_and_leaves_hands_over() -> None:
    service = Service(seconds=1)
    dispatcher = service.dispatcher()
    answers: dict[str, str] = {}

    async def one(text: str) -> None:
        answers.update(await ask(dispatcher, text))

    async with anyio.create_task_group() as tasks:
        leaver = anyio.CancelScope()

        async def leaving() -> None:
            with leaver:
                await ask(dispatcher, "a", "b", "x")

        tasks.start_soon(one, "a")
        tasks.start_soon(one, "b")
        tasks.start_soon(leaving)  # the last caller in this loop iteration: it carries the batch of all three
        await anyio.sleep(0.5)
        assert service.batches == [["a", "b", "x"]]
        leaver.cancel()
    assert answers == {"a": "A", "b": "B"}
    assert [set(batch) for batch in service.batches] == [{"a", "b", "x"}, {"a", "b"}]
    assert dispatcher.statistics.in_flight == 0


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_any_of_those_in_one_batch_may_leave(victim: int) -> None:
    service = Service(seconds=1)
    dispatcher = service.dispatcher()
    tasks = [asyncio.create_task(ask(dispatcher, f"q{number}", "shared")) for number in range(3)]
    await anyio.sleep(0.5)
    tasks[victim].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        if number == victim:
            assert isinstance(outcome, asyncio.CancelledError)
        else:
            assert outcome == {f"q{number}": f"Q{number}", "shared": "SHARED"}


async def test_all_leave_and_nothing_is_left() -> None:
    service = Service(seconds=1)
    dispatcher = service.dispatcher(first_limit=1)
    before = asyncio.all_tasks()
    tasks = [asyncio.create_task(ask(dispatcher, f"q{number}")) for number in range(30)]
    await anyio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    statistics = dispatcher.statistics
    assert (statistics.in_flight, statistics.waiting, service.at_once) == (0, 0, 0)
    assert asyncio.all_tasks() == before
    assert await ask(dispatcher, "a") == {"a": "A"}


async def test_closing_fails_those_who_wait() -> None:
    service = Service(seconds=5)
    dispatcher = service.dispatcher(first_limit=1)
    tasks = [asyncio.create_task(ask(dispatcher, f"q{number}")) for number in range(30)]
    await anyio.sleep(1)
    dispatcher.close()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, SearchError) and "closed" in str(outcome) for outcome in outcomes)
    assert service.at_once == 0


async def test_a_request_that_hangs_holds_nobody_up_for_long() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if "hang0" in texts:
            await anyio.sleep(25)

    service = Service(before=before)
    dispatcher = service.dispatcher()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, dispatcher, *(f"hang{number}" for number in range(10)))
        await anyio.sleep(1)
        for number in range(3):
            began = now()
            await ask(dispatcher, f"q{number}")
            assert now() - began < 0.3, "though ten are in flight"


@pytest.mark.parametrize("retry_after", [None, 18.0, 280.0])
async def test_whoever_comes_while_all_others_rest_looks_out_alone(retry_after: float | None) -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if "rests" in texts:
            raise PassingFault("500", cause="500", retry_after=retry_after)
        if "leaves" in texts:
            raise TooManyRequests("slower", retry_after=1.0)

    dispatcher = Service(before=before).dispatcher()
    resting = asyncio.create_task(ask(dispatcher, "rests"))
    await anyio.sleep(0.1)
    leaving = asyncio.create_task(ask(dispatcher, "leaves"))
    await anyio.sleep(0.1)
    leaving.cancel()
    await anyio.sleep(0.1)
    began = now()
    assert await ask(dispatcher, "comes") == {"comes": "COMES"}
    assert now() - began < 1.1
    resting.cancel()
    await asyncio.gather(resting, leaving, return_exceptions=True)


async def test_retry_after_nothing_is_no_leave_to_hammer() -> None:
    service = Service(before=failing(TooManyRequests("slower", retry_after=0.0)), seconds=0.01)
    with pytest.raises(StoreError, match="kept failing"):
        await ask(service.dispatcher(retry_budget=60), "a")
    assert len(service.batches) < 15


async def test_a_batch_too_large_to_be_answered_in_time_is_split() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        await anyio.sleep(0.5 * len(texts))

    service = Service(before=before, capacity=Capacity(items=100, requests=1))
    answers = await ask(service.dispatcher(request_timeout=30), *(f"q{number}" for number in range(100)))
    assert len(answers) == 100
    assert max(len(batch) for batch in service.batches[2:]) == 50


async def test_old_timeouts_are_no_outage_while_others_are_answered() -> None:
    async def before(number: int, texts: Sequence[str]) -> None:
        if texts[0].startswith("hang") and number < 4:
            await anyio.sleep_forever()

    service = Service(before=before, capacity=Capacity(items=1, requests=8))
    dispatcher = service.dispatcher(request_timeout=12)
    async with anyio.create_task_group() as tasks:
        for number in range(2):
            tasks.start_soon(ask, dispatcher, f"hang{number}")
        for number in range(110):
            await ask(dispatcher, f"q{number}")
        await anyio.sleep(1.1)
        assert dispatcher.statistics.seconds_down == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), items=st.integers(1, 8), requests=st.integers(1, 6))
def test_whatever_happens_every_call_ends_with_its_own_answers(seed: int, items: int, requests: int) -> None:
    """Random calls, faults, cancellations and delays: no call is lost, mixed up, or leaves a task behind."""

    async def main() -> None:
        generator = random.Random(seed)

        async def before(number: int, texts: Sequence[str]) -> None:
            await anyio.sleep(generator.random())
            if generator.random() < 0.2:
                raise generator.choice(
                    [RESET, TooManyRequests("slower", retry_after=generator.choice([None, 3.0])), RefusedInput("no")]
                )

        service = Service(before=before, capacity=Capacity(items, requests))
        dispatcher = service.dispatcher(max_outage=10_000)

        async def one() -> None:
            await anyio.sleep(generator.random() * 20)
            texts = [f"q{generator.randrange(40)}" for _ in range(generator.randrange(1, 5))]
            patience = generator.choice([0.3, 1_000, 1_000])
            with anyio.move_on_after(patience) as scope, contextlib.suppress(StoreError):
                assert await ask(dispatcher, *texts) == {text: text.upper() for text in texts}
            assert patience < 1 or not scope.cancelled_caught, "it stalled"

        async with anyio.create_task_group() as tasks:
            for _ in range(40):
                tasks.start_soon(one)
        statistics = dispatcher.statistics
        assert (statistics.in_flight, statistics.waiting, service.at_once) == (0, 0, 0)
        assert service.most_at_once <= requests
        assert max(len(batch) for batch in service.batches) <= items

    with asyncio.Runner(debug=True, loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())
