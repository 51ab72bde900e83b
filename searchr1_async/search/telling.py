"""Reports each long wait for a service once, and refuses waits that are too long. No clock: the caller passes the time."""

from __future__ import annotations

import logging
import math

from searchr1_async.boundary.network import refused_wait
from searchr1_async.boundary.waits import TOLD_AFTER, Tell, tell_of
from searchr1_async.errors import SearchUnavailableError
from searchr1_async.search.faults import PassingFault, TooManyRequests
from searchr1_async.search.pacing import Pacer, PacingSettings

logger = logging.getLogger(__name__)


class Telling:
    """Reports the waits for one service.

    ``tell`` receives every wait over :data:`~searchr1_async.boundary.waits.TOLD_AFTER` seconds once, with its reason and end.
    None for searches of a run, whose view shows outages: then only rate limits are logged.
    """

    def __init__(self, name: str, settings: PacingSettings, pacer: Pacer) -> None:
        self.tell: Tell | None = None
        self._name = name
        self._settings = settings
        self._pacer = pacer
        self._reported_until = -math.inf
        self._outage_reported = False

    def refuse_long(self, fault: PassingFault) -> None:
        """Raises SearchUnavailableError if ``Retry-After`` exceeds ``PacingSettings.longest_wait``."""
        asked, longest = fault.retry_after, self._settings.longest_wait
        if asked is not None and asked > longest:
            words = refused_wait(self._name, asked, longest, "PacingSettings.longest_wait")
            raise SearchUnavailableError(f"{words} ({fault})") from fault

    def failed(self, fault: PassingFault, now: float) -> None:
        """A request failed; call after updating the pacer."""
        down = self._pacer.down_for(now)
        if isinstance(fault, TooManyRequests):
            self._asked(fault, now, (self._pacer.opens_at(now) or now) - now)
        elif down > TOLD_AFTER and not self._outage_reported and self.tell is not None:
            self._outage_reported = True
            left = max(self._settings.max_outage - down, 2 * TOLD_AFTER)
            tell_of(left, f"{self._name} does not answer ({fault})", self.tell)
        elif not down:
            self._asked(fault, now, fault.retry_after or 0.0)

    def answered(self) -> None:
        """A request was answered; call after updating the pacer."""
        if self._outage_reported and self.tell is not None:
            self._outage_reported = False
            self.tell(f"{self._name} answers again")

    def hangs(self, text: str, until: float) -> None:
        """A request has been pending for long, until it times out at ``until``. Reports only the first of several."""
        if self.tell is not None and self._is_new(until):
            self.tell(text)

    def _asked(self, fault: PassingFault, now: float, seconds: float) -> None:
        if seconds > TOLD_AFTER and self._is_new(now + seconds):
            tell_of(seconds, f"{self._name} asks to back off ({fault})", self.tell or logger.warning)

    def _is_new(self, until: float) -> bool:
        """Whether a wait until then was not reported yet; requests that fail together have about the same end."""
        if until <= self._reported_until + TOLD_AFTER:
            return False
        self._reported_until = until
        return True
