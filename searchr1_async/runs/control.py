"""Control of a run: stop, pause, resume, and the use of what it has open. Also lists this process's runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

import anyio

from searchr1_async.events import Emit, RunPaused, RunResumed, emit_nothing
from searchr1_async.runs.ask import LiveAnswers
from searchr1_async.service.connection import Service

T = TypeVar("T")
Result = TypeVar("Result")


class Lent(Generic[T]):
    """Something of a run that others use while the run has it."""

    def __init__(self) -> None:
        self._value: T | None = None
        self._is_over = False
        self._users: set[anyio.CancelScope] = set()
        self._changed = anyio.Event()  # replaced by a fresh one at each change

    @contextmanager
    def lending(self, value: T) -> Iterator[None]:
        """During the block others can use the value; those that still do at its end are cancelled."""
        self._value = value
        self._notify()
        try:
            yield
        finally:
            self._value = None
            for scope in self._users:
                scope.cancel()

    async def wait_unused(self) -> None:
        """Lets nobody begin to use the value, and returns when nobody does."""
        self._value = None
        while self._users:
            await self._changed.wait()

    def end(self) -> None:
        """The run is over."""
        self._is_over = True
        self._notify()

    async def wait_ended(self) -> None:
        """Returns once the run is over."""
        while not self._is_over:
            await self._changed.wait()

    async def use(self, work: Callable[[T], Awaitable[Result]]) -> Result | None:
        """Waits for the value and uses it; None if the run ends first."""
        while self._value is None:
            if self._is_over:
                return None
            await self._changed.wait()
        with anyio.CancelScope() as scope:
            self._users.add(scope)
            try:
                return await work(self._value)
            finally:
                self._users.discard(scope)
                self._notify()
        return None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class RunControl:
    """Shared between a run and its handle: the handle requests, the run obeys. Belongs to the run's event loop.

    A stop cancels requests in flight or, if a step is nearly done, waits for it; finished steps are kept. A pause stops new
    samples and the next step; requests in flight finish, and episodes wait where they are.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self.emit: Emit = emit_nothing
        """Receives :class:`RunPaused` and :class:`RunResumed`."""
        self.service: Lent[Service] = Lent()
        self.answers: Lent[LiveAnswers] = Lent()
        self.answering = self.answers.lending
        self._cuts: list[Callable[[], None]] = []
        self._holds: list[Callable[[bool], None]] = []
        self._resumed = anyio.Event()
        self._pause_reasons: set[str] = set()
        self._paused_at = self._paused_seconds = 0.0

    def end(self) -> None:
        """The run is over."""
        self.service.end()
        self.answers.end()

    @asynccontextmanager
    async def serving(self, service: Service) -> AsyncIterator[None]:
        """Lends the run's service during the block, and waits for its users at the end, unless the run fails or is cancelled."""
        with self.service.lending(service):
            yield
            await self.service.wait_unused()

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

    @property
    def is_paused(self) -> bool:
        """The user has paused the run; it may wait for its service as well."""
        return "user" in self._pause_reasons

    def pause(self) -> None:
        """Pauses the run; idempotent."""
        if not self.is_paused:
            self._hold("user", True)
            self.emit(RunPaused())

    def resume(self) -> None:
        """Resumes a paused run; idempotent."""
        if self.is_paused:
            self._hold("user", False)
            self.emit(RunResumed())

    def wait_for_service(self, is_silent: bool) -> None:
        """Pauses the run and its clock while its Tinker service does not answer."""
        self._hold("service", is_silent)

    @property
    def waits_for_service(self) -> bool:
        """The Tinker service does not answer, so no request to it can finish."""
        return "service" in self._pause_reasons

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


class RunUnderWay(Protocol):
    """A run that this process is training."""

    control: RunControl

    @property
    def done(self) -> bool: ...


_runs: WeakValueDictionary[Path, RunUnderWay] = WeakValueDictionary()


def register(out_dir: Path, run: RunUnderWay) -> None:
    """Makes a run findable by its folder."""
    _runs[out_dir.resolve()] = run


def run_under_way(folder: Path) -> RunUnderWay | None:
    """The run this process is training in a folder, or None."""
    run = _runs.get(folder.resolve())
    return None if run is None or run.done else run
