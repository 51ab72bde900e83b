"""The hand on a run: stop it, hold it, let it go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio

from searchr1_async.events import Emit, RunPaused, RunResumed, emit_nothing


class RunControl:
    """Shared by a run's handle, which says what is wanted, and by the run, which does it.

    A stop is clean: what the services are at is cancelled or, where it is a step that is nearly done, waited for; finished
    steps are kept. A pause holds the sampler and the next step: requests on their way come to their end, and episodes wait
    where they are. Belongs to one event loop, that of the run.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self.is_paused = False
        self.emit: Emit = emit_nothing
        """Is told of pauses."""
        self.wall_clock: Callable[[], float] = time.time
        """Seconds that go on while the run is held and while the machine sleeps, as a service's own do."""
        self._cuts: list[Callable[[], None]] = []
        self._holds: list[Callable[[bool], None]] = []
        self._goes_on = anyio.Event()
        self._paused_at = self._paused_seconds = 0.0

    # --- stopping -----------------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Stops the run; once is enough."""
        if self.stop_requested:
            return
        self.stop_requested = True
        if self._cuts:
            self._cuts[-1]()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that a stop cuts short; afterwards ``stop_requested`` says whether it did.

        Where such blocks lie within each other the innermost is cut, and what is around it ends by itself.
        """
        with anyio.CancelScope() as scope, self.ending_with(scope.cancel):
            if self.stop_requested:
                scope.cancel()
            yield

    @contextmanager
    def ending_with(self, cut: Callable[[], None]) -> Iterator[None]:
        """While the block runs, a stop calls ``cut`` and leaves alone what is around it: for work that ends in its own way."""
        self._cuts.append(cut)
        try:
            yield
        finally:
            self._cuts.remove(cut)

    # --- holding ------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Holds the run; no effect on one that is held."""
        if not self.is_paused:
            self.is_paused, self._goes_on = True, anyio.Event()
            self._paused_at = anyio.current_time()
            self._hold(True)
            self.emit(RunPaused())

    def resume(self) -> None:
        """Lets the run go on; no effect on one that does."""
        if self.is_paused:
            self._paused_seconds += anyio.current_time() - self._paused_at
            self.is_paused = False
            self._goes_on.set()
            self._hold(False)
            self.emit(RunResumed())

    @contextmanager
    def holding(self, hold: Callable[[bool], None]) -> Iterator[None]:
        """While the block runs ``hold`` is called with True when the run is to be held, with False when it is to go on."""
        self._holds.append(hold)
        try:
            if self.is_paused:
                hold(True)
            yield
        finally:
            self._holds.remove(hold)

    def _hold(self, is_paused: bool) -> None:
        for hold in self._holds:
            hold(is_paused)

    async def wait_while_paused(self) -> None:
        """Returns when the run is not held; at once where it is not."""
        while self.is_paused:
            await self._goes_on.wait()

    def now(self) -> float:
        """Seconds of a clock that stands still while the run is held: what it takes and may take is measured by it."""
        now = self._paused_at if self.is_paused else anyio.current_time()
        return now - self._paused_seconds

    async def sleep_until(self, deadline: float) -> None:
        """Until that clock shows ``deadline``."""
        while (left := deadline - self.now()) > 0:
            await self.wait_while_paused()
            await anyio.sleep(left)  # a pause that begins meanwhile puts the deadline off
