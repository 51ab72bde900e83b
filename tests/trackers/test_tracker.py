"""The tracker queue: non-blocking, ordered, isolated from the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from searchr1_async.errors import ConfigurationError
from searchr1_async.events import BatchClosed, Event
from searchr1_async.trackers import JsonlTracker, QueuedTracker, make_trackers, open_trackers
from searchr1_async.trackers import tracker as base
from searchr1_async.trackers.tracker import Timed

pytestmark = pytest.mark.anyio


class Kept(QueuedTracker):
    """Records events and the calling threads."""

    name = "kept"

    def __init__(self, **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.calls: list[str] = []
        self.steps: list[int] = []
        self.threads: set[int] = set()

    def open(self) -> None:
        self._called("open")

    def write(self, batch: Sequence[Timed]) -> None:
        self._called("write")
        self.steps += [event.step for _, event in batch if isinstance(event, BatchClosed)]

    def close(self) -> None:
        self._called("close")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())


async def test_events_arrive_in_order_in_one_thread() -> None:
    kept = Kept()
    async with kept:
        for step in range(1000):
            kept(BatchClosed(step, 1))
    assert kept.steps == list(range(1000))
    assert kept.calls[0] == "open"
    assert kept.calls[-1] == "close"
    assert len(kept.threads) == 1
    assert threading.get_ident() not in kept.threads
    kept(BatchClosed(1000, 1))
    assert kept.steps[-1] == 999, "nothing arrives after the end"


@pytest.mark.parametrize("where", ["open", "write", "close"])
async def test_failing_tracker_is_dropped_with_one_warning(where: str, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Kept):
        def _called(self, name: str) -> None:
            super()._called(name)
            if name == where:
                raise SystemExit("the service's client gives up")

    failing = Failing()
    async with failing:
        for step in range(3):
            failing(BatchClosed(step, 1))
    assert failing.is_dropped
    assert len([record for record in caplog.records if "kept failed" in record.getMessage()]) == 1
    assert failing.calls.count("close") == (0 if where == "open" else 1)


async def test_hanging_service_does_not_delay_the_end(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    class Hanging(Kept):
        def write(self, batch: Sequence[Timed]) -> None:
            release.wait(30)

    trackers = [Hanging(close_within=0.2) for _ in range(3)]
    began = time.monotonic()
    async with open_trackers(trackers) as opened:
        for tracker in opened:
            tracker(BatchClosed(1, 1))
    seconds = time.monotonic() - began
    release.set()
    assert seconds < 5, "30 s each if it waited"
    assert all(tracker.is_dropped for tracker in trackers)
    assert len([record for record in caplog.records if "was abandoned" in record.getMessage()]) == 3


async def test_cancelled_run_flushes_its_events() -> None:
    kept = Kept()
    with anyio.CancelScope() as scope:
        async with kept:
            kept(BatchClosed(1, 1))
            scope.cancel()
            await anyio.sleep_forever()
    assert kept.steps == [1]
    assert kept.calls[-1] == "close"


async def test_queue_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(base, "MAX_WAITING", 10)
    release = threading.Event()

    class Slow(Kept):
        def open(self) -> None:
            release.wait(30)

    slow = Slow()
    async with slow:
        for step in range(25):
            slow(BatchClosed(step, 1))
        release.set()
    assert slow.steps == list(range(10))
    assert len([record for record in caplog.records if "is too slow" in record.getMessage()]) == 1


async def test_custom_tracker_cannot_affect_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Own:
        def __init__(self, fails: str) -> None:
            self.fails = fails

        def __call__(self, event: Event) -> None: ...

        async def __aenter__(self) -> Own:
            if self.fails == "open":
                raise OSError("no network")
            return self

        async def __aexit__(self, *error: object) -> None:
            if self.fails == "close":
                raise OSError("no network")

    async with open_trackers([Own("open"), Own("close"), Own("")]) as opened:
        assert [tracker.fails for tracker in opened if isinstance(tracker, Own)] == ["close", ""]
    assert len(caplog.records) == 2


async def test_log_is_automatic_and_others_are_by_name(tmp_path: Path) -> None:
    own = Kept()
    made = make_trackers([own], tmp_path)
    assert isinstance(made[0], JsonlTracker)
    assert made[1] is own
    assert make_trackers((), None) == []
    assert make_trackers(own) == [own]
    for wrong, words in (
        ("wandbb", "choose from wandb"),
        ("parquet", "always"),
        (Kept, "an instance"),
        (3, "no tracker"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make_trackers([wrong], tmp_path)  # type: ignore[list-item]


async def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'searchr1_async\[wandb\]'"):
        make_trackers("wandb")
