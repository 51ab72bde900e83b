"""What a refused wait says; the header's forms are tried with the faults of the services that send it."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from searchr1_async.boundary.network import long_wait_text, seconds_asked


def test_a_wait_that_is_too_long_says_how_long_until_when_and_what_allows_it() -> None:
    text = long_wait_text("the hub", 86_399, 600, "longest_wait")
    tomorrow = datetime.now().astimezone() + timedelta(seconds=86_399)
    assert "the hub asks for a wait of 86,399 s" in text
    assert f"until {tomorrow:%Y-%m-%d}" in text
    assert "longest_wait=600 allows" in text


@pytest.mark.parametrize("seconds", [1e9, 999_999_999.0])
def test_an_absurd_wait_is_said_as_well(seconds: float) -> None:
    assert f"{seconds:,.0f} s" in long_wait_text("the hub", seconds, 600, "longest_wait")


def test_the_header_is_seconds_or_a_date() -> None:
    now = datetime.fromisoformat("2026-11-30T04:00:00+00:00")
    assert seconds_asked("86399", now) == 86_399
    assert seconds_asked("Mon, 30 Nov 2026 05:00:00 GMT", now) == 3_600
    assert seconds_asked("soon", now) is None
