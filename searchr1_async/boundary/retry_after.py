"""The header ``Retry-After``: how long a service asks to be left alone, and what to say where that is too long."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from searchr1_async.boundary.waits import clock_time


def seconds_asked(retry_after: str, now: datetime) -> float | None:
    """What the header ``Retry-After`` asks to wait (RFC 9110, 10.2.3): seconds, or an HTTP date; 0 for a time gone by.

    Args:
        retry_after: the header's value.
        now: the time of day, with its zone.

    Returns:
        Seconds; None for a value that is neither.
    """
    value = retry_after.strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value, re.ASCII):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())


def refused_wait(name: str, seconds: float, longest: float, setting: str) -> str:
    """What to say of a service that asks for a longer wait than is allowed.

    Args:
        name: of the service.
        seconds: that it asks for.
        longest: seconds that are allowed.
        setting: that allows them, as its user writes it.
    """
    end = clock_time(min(seconds, 10 * 365 * 86_400))
    return (
        f"{name} asks to be left alone for {seconds:,.0f} s, until {end} (a quota?), which is longer than "
        f"{setting}={longest:g} allows: what is done is kept, so run the same again after that, or raise {setting}"
    )
