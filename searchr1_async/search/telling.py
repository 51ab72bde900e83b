"""Which waits for a service are reported, each once, and which are too long to wait. No clock, no task; the caller passes the time."""

from __future__ import annotations

import logging
import math

from searchr1_async.boundary.retry_after import refused_wait
from searchr1_async.boundary.waits import TOLD_AFTER, Tell, tell_of
from searchr1_async.errors import SearchUnavailableError
from searchr1_async.search.faults import PassingFault, TooManyRequests
from searchr1_async.search.pacing import Pacer, PacingSettings

logger = logging.getLogger(__name__)


class Telling:
    """The waits for one service.

    Args:
        name: of the service.
        settings: its pacing.
        pacer: knows the service's state.

    Attributes:
        tell: gets every wait over :data:`~searchr1_async.boundary.waits.TOLD_AFTER` seconds once, with its reason and its end. None
            for searches of a run, whose view shows outages: then only waits that the service asks for are reported, in the log.
    """

    def __init__(self, name: str, settings: PacingSettings, pacer: Pacer) -> None:
        self.tell: Tell | None = None
        self._name = name
        self._settings = settings
        self._pacer = pacer
        self._told_until = -math.inf
        self._is_outage_told = False

    def refuse_long(self, fault: PassingFault) -> None:
        """Refuses to wait for as long as a service asks for.

        Raises:
            SearchUnavailableError: it asks for more than ``PacingSettings.longest_wait``.
        """
        asked, longest = fault.retry_after, self._settings.longest_wait
        if asked is not None and asked > longest:
            words = refused_wait(self._name, asked, longest, "PacingSettings.longest_wait")
            raise SearchUnavailableError(f"{words} ({fault})") from fault

    def failed(self, fault: PassingFault, now: float) -> None:
        """A request failed, and the pacer knows of it."""
        down = self._pacer.down_for(now)
        if isinstance(fault, TooManyRequests):
            self._asked(fault, now, (self._pacer.opens_at(now) or now) - now)
        elif down > TOLD_AFTER and not self._is_outage_told and self.tell is not None:
            self._is_outage_told = True
            left = max(self._settings.max_outage - down, 2 * TOLD_AFTER)
            tell_of(left, f"{self._name} does not answer ({fault})", self.tell)
        elif not down:
            self._asked(fault, now, fault.retry_after or 0.0)

    def answered(self) -> None:
        """A request was answered, and the pacer knows of it."""
        if self._is_outage_told and self.tell is not None:
            self._is_outage_told = False
            self.tell(f"{self._name} answers again")

    def hangs(self, text: str, until: float) -> None:
        """A request has not been answered for long; of several such requests only the first is reported.

        Args:
            text: what to say.
            until: when it is given up.
        """
        if self.tell is not None and self._is_new(until):
            self.tell(text)

    def _asked(self, fault: PassingFault, now: float, seconds: float) -> None:
        if seconds > TOLD_AFTER and self._is_new(now + seconds):
            tell_of(seconds, f"{self._name} asks to be left alone ({fault})", self.tell or logger.warning)

    def _is_new(self, until: float) -> bool:
        """Whether a wait until then was not reported yet. Requests that fail together ask for about the same wait."""
        if until <= self._told_until + TOLD_AFTER:
            return False
        self._told_until = until
        return True
