"""Event iterators."""

from __future__ import annotations

import anyio
import pytest

from searchr1_async.events import MAX_QUEUED, Event, EventStreams, Notice, StepFinished

pytestmark = pytest.mark.anyio


async def test_every_reader_gets_all_events_from_its_start() -> None:
    streams, is_over = EventStreams(), False
    seen: dict[str, list[Event]] = {"early": [], "late": []}
    began = {name: anyio.Event() for name in seen}

    async def read(name: str) -> None:
        events = streams.events(lambda: is_over)
        began[name].set()
        async for event in events:
            seen[name].append(event)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read, "early")
        await began["early"].wait()
        streams(StepFinished(1, {}))
        await anyio.lowlevel.checkpoint()
        tasks.start_soon(read, "late")
        await began["late"].wait()
        await anyio.lowlevel.checkpoint()
        streams(StepFinished(2, {}))
        streams(StepFinished(3, {}))
        is_over = True
        streams.wake()
    assert [event.step for event in seen["early"] if isinstance(event, StepFinished)] == [1, 2, 3]
    assert [event.step for event in seen["late"] if isinstance(event, StepFinished)] == [2, 3]


async def test_slow_reader_loses_the_oldest_and_is_notified() -> None:
    streams = EventStreams()
    events = streams.events(lambda: True)
    streams(StepFinished(0, {}))
    for step in range(1, MAX_QUEUED + 5):
        streams(StepFinished(step, {}))
    read = [event async for event in events]
    assert isinstance(read[0], Notice)
    assert read[0].is_warning
    assert "5 events" in read[0].text
    assert [event.step for event in read[1:] if isinstance(event, StepFinished)] == list(range(5, MAX_QUEUED + 5))


async def test_abandoned_reader_is_dropped() -> None:
    streams = EventStreams()
    events = streams.events(lambda: False)
    streams(StepFinished(1, {}))
    async for _ in events:
        break
    assert len(streams._readers) == 1
    await events.aclose()
    assert len(streams._readers) == 0
    never_begun = streams.events(lambda: False)
    assert len(streams._readers) == 1
    del never_begun
    assert len(streams._readers) == 0
