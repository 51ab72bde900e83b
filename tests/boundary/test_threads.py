"""Items prepared in a thread while the previous one is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.boundary.waits import prepared_ahead


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(), max_size=8))
def test_items_keep_their_order(items: list[int | None]) -> None:
    assert list(prepared_ahead(iter(items))) == items


def test_exactly_one_item_is_prepared_ahead() -> None:
    made = [threading.Event() for _ in range(4)]

    def making() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    items = prepared_ahead(making())
    assert not made[0].is_set(), "nothing is begun before it is asked for"
    assert next(items) == 0
    assert made[1].wait(10)
    assert not made[2].is_set()
    assert next(items) == 1
    assert made[2].wait(10)
    items.close()
    assert not made[3].is_set(), "whoever has gone has no more made for them"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("searchr1-ahead")]


def test_a_failure_is_raised_in_place_of_its_item() -> None:
    def making() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = prepared_ahead(making())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
