"""Control of a run: stop, pause, resume, ask. And the registry of this process's runs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import anyio

from searchr1_async.errors import ServiceError
from searchr1_async.events import Emit, RunPaused, RunResumed, emit_nothing
from searchr1_async.runs.ask import Answer, LiveAnswers
from searchr1_async.service.connection import Service


class RunControl:
    """Shared between a run and its handle: the handle requests, the run obeys. Belongs to the run's event loop.

    A stop cancels requests in flight or, if a step is nearly done, waits for it; finished steps are kept. A pause stops new
    samples and the next step; requests in flight finish, and episodes wait where they are.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self.is_paused = False
        self.emit: Emit = emit_nothing
        """Receives :class:`RunPaused` and :class:`RunResumed`."""
        self.wall_clock: Callable[[], float] = time.time
        """Seconds of a clock that also runs during a pause and while the machine sleeps, as a service's clock does."""
        self._service: Service | None = None
        self._users: list[anyio.CancelScope] = []
        self._user_left = anyio.Event()
        self._cuts: list[Callable[[], None]] = []
        self._holds: list[Callable[[bool], None]] = []
        self._resumed = anyio.Event()
        self._pause_reasons: set[str] = set()
        self._paused_at = self._paused_seconds = 0.0
        self._answers: LiveAnswers | None = None
        self._is_over = False
        self._answers_changed = anyio.Event()  # replaced by a fresh one at each change
        self._asked: set[anyio.CancelScope] = set()

    # --- stopping -----------------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Stops the run; idempotent."""
        if self.stop_requested:
            return
        self.stop_requested = True
        if self._cuts:
            self._cuts[-1]()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a stop cancels; check ``stop_requested`` afterwards. Of nested blocks, only the innermost is cancelled."""
        with anyio.CancelScope() as scope, self.ending_with(scope.cancel):
            if self.stop_requested:
                scope.cancel()
            yield

    @contextmanager
    def ending_with(self, cut: Callable[[], None]) -> Iterator[None]:
        """During the block, a stop only calls ``cut``: for work that ends in its own way."""
        self._cuts.append(cut)
        try:
            yield
        finally:
            self._cuts.remove(cut)

    # --- pausing ------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Pauses the run; idempotent."""
        if not self.is_paused:
            self.is_paused = True
            self._hold("pause", True)
            self.emit(RunPaused())

    def resume(self) -> None:
        """Resumes a paused run; idempotent."""
        if self.is_paused:
            self.is_paused = False
            self._hold("pause", False)
            self.emit(RunResumed())

    def wait_for_service(self, is_silent: bool) -> None:
        """Pauses the run and its clock while its Tinker service does not answer."""
        self._hold("service", is_silent)

    # --- sharing the run's service ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def serving(self, service: Service) -> AsyncIterator[None]:
        """Lets others use the run's service during the block, and waits for them at its end.

        They are cancelled if the run fails, is cancelled, or is stopped while waiting.
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
        """The run's service during the block; None if it is not open.

        Raises:
            ServiceError: the run and its service ended during the block.
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
                "the run ended and closed its service meanwhile: use the run's folder instead, which starts a new one"
            )

    @contextmanager
    def holding(self, hold: Callable[[bool], None]) -> Iterator[None]:
        """During the block, ``hold`` is called with True when the run pauses and with False when it continues."""
        self._holds.append(hold)
        try:
            if self._pause_reasons:
                hold(True)
            yield
        finally:
            self._holds.remove(hold)

    def _hold(self, reason: str, is_active: bool) -> None:
        """Adds or removes a reason to pause; the run continues when none is left."""
        was_paused = bool(self._pause_reasons)
        self._pause_reasons = self._pause_reasons | {reason} if is_active else self._pause_reasons - {reason}
        if bool(self._pause_reasons) == was_paused:
            return
        if is_active:
            self._resumed, self._paused_at = anyio.Event(), anyio.current_time()
        else:
            self._paused_seconds += anyio.current_time() - self._paused_at
            self._resumed.set()
        for hold in self._holds:
            hold(is_active)

    @property
    def waits_for_service(self) -> bool:
        """The Tinker service does not answer, so no request to it can finish."""
        return "service" in self._pause_reasons

    async def wait_while_paused(self) -> None:
        """Returns once the run is not paused."""
        while self._pause_reasons:
            await self._resumed.wait()

    def now(self) -> float:
        """Seconds on a clock that stops while the run is paused; all time limits use it."""
        now = self._paused_at if self._pause_reasons else anyio.current_time()
        return now - self._paused_seconds

    async def sleep_until(self, deadline: float) -> None:
        """Until :meth:`now` reaches ``deadline``."""
        while (left := deadline - self.now()) > 0:
            await self.wait_while_paused()
            await anyio.sleep(left)  # a pause meanwhile extends the deadline

    # --- asking -------------------------------------------------------------------------------------------------------

    @contextmanager
    def answering(self, answers: LiveAnswers) -> Iterator[None]:
        """During the block, ``answers`` answers questions; those still running at its end are cancelled."""
        self._answers = answers
        self._notify_answers()
        try:
            yield
        finally:
            self._answers = None
            for scope in self._asked:
                scope.cancel()

    @property
    def is_answering(self) -> bool:
        """:meth:`ask` need not wait for the run's services."""
        return self._answers is not None

    def end(self) -> None:
        """The run is over: waiting :meth:`ask` calls return None."""
        self._is_over = True
        self._notify_answers()

    async def ask(self, ask: Callable[[LiveAnswers], Awaitable[Answer]]) -> Answer | None:
        """Waits until the run can answer, then asks; None if the run ends first.

        Raises:
            SearchR1Error: from ``ask``.
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

    def _notify_answers(self) -> None:
        self._answers_changed.set()
        self._answers_changed = anyio.Event()


class RunUnderWay(Protocol):
    """A run that this process is training."""

    control: RunControl

    @property
    def out_dir(self) -> Path: ...

    @property
    def done(self) -> bool: ...


_runs: WeakValueDictionary[Path, RunUnderWay] = WeakValueDictionary()


def register(run: RunUnderWay) -> None:
    """Makes a run findable by its folder."""
    _runs[run.out_dir.resolve()] = run


def run_under_way(folder: Path) -> RunUnderWay | None:
    """The run this process is training in a folder, or None."""
    run = _runs.get(folder.resolve())
    return None if run is None or run.done else run


def runs_under_way() -> list[RunUnderWay]:
    """All runs this process is training now."""
    return [run for run in list(_runs.values()) if not run.done]
