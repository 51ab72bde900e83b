"""Scheduled calls on one thread."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger(__name__)


class TimerThread:
    """Calls functions when due on one daemon thread, ordered by due time, then submission."""

    def __init__(self, name: str) -> None:
        self._heap: list[tuple[float, int, Callable[[], None], Future[Any] | None]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call_at(self, due: float, function: Callable[[], None], future: Future[Any] | None = None) -> None:
        """``due`` in :func:`time.monotonic` seconds. ``future`` is cancelled if the thread closes first."""
        with self._changed:
            if not self._closed:
                heapq.heappush(self._heap, (due, next(self._order), function, future))
                self._changed.notify()
                return
        if future is not None:
            future.cancel()

    def close(self) -> None:
        """Ends the thread and cancels open futures."""
        with self._changed:
            self._closed = True
            waiting, self._heap = self._heap, []
            self._changed.notify()
        for _, _, _, future in waiting:
            if future is not None:
                future.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    wait = self._heap[0][0] - time.monotonic() if self._heap else None
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if self._closed:
                    return
                _, _, function, _ = heapq.heappop(self._heap)
            try:
                function()
            except Exception:
                logger.exception("a timer callback failed")
