"""The header ``Retry-After``, and the message for a wait that is too long."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from searchr1_async.boundary.waits import clock_time


def seconds_asked(retry_after: str, now: datetime) -> float | None:
    """Seconds to wait by a ``Retry-After`` header (RFC 9110, 10.2.3): seconds or an HTTP date; 0 for a past date.

    Args:
        retry_after: the header's value.
        now: current time, with time zone.

    Returns:
        Seconds; None for an invalid value.
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
    """The message for a service that asks for a longer wait than allowed.

    Args:
        name: the service.
        seconds: the wait it asks for.
        longest: the longest wait allowed, in seconds.
        setting: the setting of ``longest``, as its user writes it.
    """
    end = clock_time(min(seconds, 10 * 365 * 86_400))
    return (
        f"{name} asks for a wait of {seconds:,.0f} s, until {end} (a quota?), which is longer than "
        f"{setting}={longest:g} allows: progress is kept, so run the same command again after that, or raise {setting}"
    )
