from __future__ import annotations

import logging

import pytest

from searchr1_async.events import Event, Notice, Watchers


def test_every_subscriber_sees_every_event_in_order() -> None:
    seen: list[tuple[str, Event]] = []
    watchers = Watchers([lambda event: seen.append(("a", event))])
    watchers.subscribe(lambda event: seen.append(("b", event)))
    first, second = Notice("1"), Notice("2")
    watchers(first)
    watchers(second)
    assert seen == [("a", first), ("b", first), ("a", second), ("b", second)]


def test_failing_subscriber_is_dropped_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls, seen = [], []

    def broken(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("no display")

    watchers = Watchers([broken, seen.append])
    with caplog.at_level(logging.WARNING):
        watchers(Notice("1"))
        watchers(Notice("2"))
    assert len(calls) == 1
    assert len(seen) == 2
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None
    assert "broken" in caplog.records[0].getMessage()


def test_interrupt_propagates() -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Watchers([interrupted])(Notice("1"))


def test_subscribing_and_unsubscribing_during_a_call() -> None:
    watchers, seen = Watchers(), []

    def once(event: Event) -> None:
        watchers.unsubscribe(once)
        watchers.subscribe(seen.append)

    watchers.subscribe(once)
    watchers(Notice("1"))
    watchers(Notice("2"))
    assert seen == [Notice("2")]
    watchers.unsubscribe(once)  # already removed: no error


def test_close_removes_all_subscribers() -> None:
    seen: list[Event] = []
    watchers = Watchers([seen.append])
    watchers(Notice("before"))
    watchers.close()
    watchers(Notice("too late"))
    assert seen == [Notice("before")]
