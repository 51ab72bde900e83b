"""The hand on a run: stop it, hold it, let it go on, ask it. And which runs this process trains."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

import anyio

from searchr1_async.answer import Answer
from searchr1_async.answering import LiveAnswers
from searchr1_async.errors import ServiceError
from searchr1_async.events import Emit, RunPaused, RunResumed, emit_nothing

if TYPE_CHECKING:
    from searchr1_async.connection import Service


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
        self._service: Service | None = None
        self._users: list[anyio.CancelScope] = []
        self._user_left = anyio.Event()
        self._cuts: list[Callable[[], None]] = []
        self._holds: list[Callable[[bool], None]] = []
        self._goes_on = anyio.Event()
        self._held_by: set[str] = set()
        self._paused_at = self._paused_seconds = 0.0
        self._answers: LiveAnswers | None = None
        self._is_over = False
        self._answers_changed = anyio.Event()  # replaced by a fresh one at each change
        self._asked: set[anyio.CancelScope] = set()

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
            self.is_paused = True
            self._hold("pause", True)
            self.emit(RunPaused())

    def resume(self) -> None:
        """Lets the run go on; no effect on one that does."""
        if self.is_paused:
            self.is_paused = False
            self._hold("pause", False)
            self.emit(RunResumed())

    def wait_for_service(self, is_silent: bool) -> None:
        """Holds the run while its Tinker service does not answer; the run's clock stands still."""
        self._hold("service", is_silent)

    # --- sharing the run's service ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def serving(self, service: Service) -> AsyncIterator[None]:
        """While the block runs others may use the run's service; at its end the run waits for them.

        A run that fails, is cancelled, or is stopped during that wait does not: it cancels them.
        """
        self._service = service
        try:
            yield
            self._service = None
            while self._users:
                self._user_left = anyio.Event()
                await self._user_left.wait()
        finally:
            self._service = None
            for scope in self._users:
                scope.cancel()

    @contextmanager
    def using_service(self) -> Iterator[Service | None]:
        """The run's service for the length of the block; None where it is not open.

        Raises:
            ServiceError: the run ended before the block, and its service with it.
        """
        if self._service is None:
            yield None
            return
        with anyio.CancelScope() as scope:
            self._users.append(scope)
            try:
                yield self._service
            finally:
                self._users.remove(scope)
                self._user_left.set()
        if scope.cancelled_caught:
            raise ServiceError(
                "the run was ended, and its service with it: use its folder instead, which starts another"
            )

    @contextmanager
    def holding(self, hold: Callable[[bool], None]) -> Iterator[None]:
        """While the block runs ``hold`` is called with True when the run is to be held, with False when it is to go on."""
        self._holds.append(hold)
        try:
            if self._held_by:
                hold(True)
            yield
        finally:
            self._holds.remove(hold)

    def _hold(self, reason: str, is_held: bool) -> None:
        """Holds the run for a reason, or lets that reason go; the run goes on when none is left."""
        was_held = bool(self._held_by)
        self._held_by = self._held_by | {reason} if is_held else self._held_by - {reason}
        if bool(self._held_by) == was_held:
            return
        if is_held:
            self._goes_on, self._paused_at = anyio.Event(), anyio.current_time()
        else:
            self._paused_seconds += anyio.current_time() - self._paused_at
            self._goes_on.set()
        for hold in self._holds:
            hold(is_held)

    @property
    def waits_for_service(self) -> bool:
        """The Tinker service does not answer: nothing that is under way at it can come to its end."""
        return "service" in self._held_by

    async def wait_while_paused(self) -> None:
        """Returns when the run is not held; at once where it is not."""
        while self._held_by:
            await self._goes_on.wait()

    def now(self) -> float:
        """Seconds of a clock that stands still while the run is held: what it takes and may take is measured by it."""
        now = self._paused_at if self._held_by else anyio.current_time()
        return now - self._paused_seconds

    async def sleep_until(self, deadline: float) -> None:
        """Until that clock shows ``deadline``."""
        while (left := deadline - self.now()) > 0:
            await self.wait_while_paused()
            await anyio.sleep(left)  # a pause that begins meanwhile puts the deadline off

    # --- asking -------------------------------------------------------------------------------------------------------

    @contextmanager
    def answering(self, answers: LiveAnswers) -> Iterator[None]:
        """While the block runs questions are answered by ``answers``; those under way at its end are cut."""
        self._answers = answers
        self._answers_change()
        try:
            yield
        finally:
            self._answers = None
            for scope in self._asked:
                scope.cancel()

    @property
    def is_answering(self) -> bool:
        """Whether :meth:`ask` need not wait for the run's services."""
        return self._answers is not None

    def end(self) -> None:
        """The run is over: nobody waits for it to answer any more."""
        self._is_over = True
        self._answers_change()

    async def ask(self, ask: Callable[[LiveAnswers], Awaitable[Answer]]) -> Answer | None:
        """Waits until the run can answer, and asks it; None where the run ends before the answer is there.

        Raises:
            SearchR1Error: what ``ask`` raises.
        """
        while self._answers is None:
            if self._is_over:
                return None
            await self._answers_changed.wait()
        with anyio.CancelScope() as scope:
            self._asked.add(scope)
            try:
                return await ask(self._answers)
            finally:
                self._asked.discard(scope)
        return None

    def _answers_change(self) -> None:
        self._answers_changed.set()
        self._answers_changed = anyio.Event()


class RunUnderWay(Protocol):
    """A run that this process trains."""

    control: RunControl

    @property
    def out_dir(self) -> Path: ...

    @property
    def done(self) -> bool: ...


_runs: WeakValueDictionary[Path, RunUnderWay] = WeakValueDictionary()


def register(run: RunUnderWay) -> None:
    """The run is found by its folder from now on."""
    _runs[run.out_dir.resolve()] = run


def run_under_way(folder: Path) -> RunUnderWay | None:
    """The run that this process trains in a folder; None where it trains none there, or none any more."""
    run = _runs.get(folder.resolve())
    return None if run is None or run.done else run


def runs_under_way() -> list[RunUnderWay]:
    """All runs that this process trains now."""
    return [run for run in list(_runs.values()) if not run.done]
