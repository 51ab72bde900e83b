"""Deadlines that stand still while a run is held: a long pause cuts no episode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import anyio


class PausableDeadlines:
    """The time limits of what is under way, all put off together. Used in one event loop."""

    def __init__(self) -> None:
        self._left: dict[anyio.CancelScope, float] = {}
        """Of each limit under way: seconds left while it is held, else what it was given."""
        self._paused_at: float | None = None
        self._held = 0.0

    @property
    def held(self) -> float:
        """Seconds of all pauses so far."""
        return self._held + (0.0 if self._paused_at is None else anyio.current_time() - self._paused_at)

    @contextmanager
    def limit(self, seconds: float | None) -> Iterator[anyio.CancelScope]:
        """Cuts the block after so many seconds in which the run was not held; None: never. ``cancelled_caught`` tells."""
        with anyio.CancelScope() as scope:
            if seconds is None:
                yield scope
                return
            self._left[scope] = seconds
            if self._paused_at is None:
                scope.deadline = anyio.current_time() + seconds
            try:
                yield scope
            finally:
                del self._left[scope]

    def pause(self, is_paused: bool) -> None:
        """Holds all of them, or lets them go on."""
        now = anyio.current_time()
        if is_paused and self._paused_at is None:
            self._paused_at = now
            for scope in self._left:
                self._left[scope] = scope.deadline - now
                scope.deadline = math.inf
        elif not is_paused and self._paused_at is not None:
            self._held += now - self._paused_at
            self._paused_at = None
            for scope, left in self._left.items():
                scope.deadline = now + left
