"""Signals and standard streams of this process.

SIGINT, SIGTERM and SIGHUP stop its work cleanly. By default, Python raises :class:`KeyboardInterrupt` wherever it happens to be, and
libraries may raise it in worker threads (polars, when started with SIGINT ignored). Here a signal raises nothing: it asks the work, on
the event loop, to stop, and the program ends once the work has closed everything.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

REPEAT_SECONDS = 0.5
"""Signals repeated this soon count as one: ``timeout`` and ``uv run`` signal both the process and its group."""
_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ASYNCIO = logging.getLogger("asyncio")
_GONE = (OSError, ValueError)
"""A broken pipe or lost terminal; a closed file."""


def print_line(text: str, stream: TextIO | None) -> bool:
    """Writes and flushes a line; returns whether that succeeded.

    Args:
        stream: may be None, as ``sys.stderr`` is in a process started without one.
    """
    if stream is None:
        return False
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except _GONE:
        return False
    return True


@contextmanager
def standard_streams() -> Iterator[None]:
    """The outermost block of a command: redirects broken standard streams to the null device, so that Python's flush at exit neither
    complains nor changes the exit status."""
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)


def _settle(stream: TextIO | None) -> None:
    if stream is None:
        return
    try:
        stream.flush()
    except _GONE:
        try:
            number = stream.fileno()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)
        except _GONE:  # not a file, or closed
            return


def _is_kept_record(record: logging.LogRecord) -> bool:
    """A filter for asyncio's log: drops errors of cancelled requests, which nothing awaits."""
    return "exception was never retrieved" not in record.getMessage()


class Terminated(KeyboardInterrupt):
    """The work was ended by SIGTERM or SIGHUP."""

    def __init__(self, text: str, received: signal.Signals) -> None:
        super().__init__(text)
        self.received = received


class Interrupts:
    """Signal handling while stoppable work runs. At most one is active; see :func:`ending_cleanly`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.received: signal.Signals | None = None
        """The first signal received."""
        self._loop = loop
        self._at = 0.0
        self._works: list[tuple[Callable[[], object], str]] = []
        self._left: list[str] = []
        self._before: dict[signal.Signals, Any] = {}

    def enter(self, stop: Callable[[], object], left: str) -> None:
        """Registers work; the first registration installs the handlers."""
        self._works.append((stop, left))
        _ASYNCIO.removeFilter(_is_kept_record)  # left over if a program caught its KeyboardInterrupt
        for number in _NUMBERS if len(self._works) == 1 else ():
            handler = signal.getsignal(number)
            if _may_be_replaced(number, handler):
                self._before[number] = handler
                signal.signal(number, self._handle)
                if _has_come(handler):  # just before: asyncio already cancels the task that starts this work
                    self.received = signal.SIGINT
                    self._loop.call_soon(self._stop)

    def leave(self, stop: Callable[[], object], left: str) -> bool:
        """Unregisters work; returns whether it was the last, which restores the handlers and, after a signal, ends the program."""
        self._works.remove((stop, left))
        if self.received is not None and left:
            self._left.append(left)
        if self._works:
            return False
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        if self.received is not None:
            self._loop.call_soon(_end_program, self.received, " ".join(self._left))
        return True

    @contextmanager
    def cancelling(self) -> Iterator[None]:
        """Treats a KeyboardInterrupt in the block, also in exception groups, as SIGINT.

        Raises:
            asyncio.CancelledError: instead of it.
        """
        try:
            yield
        except BaseException as error:
            if not is_interrupt(error):
                raise
            self.received = self.received or signal.SIGINT
            raise asyncio.CancelledError from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._loop.is_running():  # between two cells in IPython
            self._pass_on(number, frame)
        elif self.received is None:
            self.received, self._at = signal.Signals(number), now
            self._loop.call_soon_threadsafe(self._stop)
        elif now - self._at >= REPEAT_SECONDS:
            end_at_once(number)

    def _stop(self) -> None:
        _ASYNCIO.addFilter(_is_kept_record)
        for stop, _ in list(self._works):
            try:
                stop()
            except Exception:
                logger.exception("could not ask the work to stop; a second signal ends the process immediately")

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        before = self._before[signal.Signals(number)]
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(number, before)
            signal.raise_signal(number)


_interrupts: Interrupts | None = None


@contextmanager
def ending_cleanly(stop: Callable[[], object], left: str = "") -> Iterator[Interrupts]:
    """The first SIGINT, SIGTERM or SIGHUP during the block calls ``stop``; the block should then end soon.

    When all such blocks have ended, the handlers are restored and the program ends: KeyboardInterrupt, or its subclass
    :class:`Terminated` for SIGTERM and SIGHUP, propagates out of the event loop and cancels everything else. Uncaught, it prints one
    line without traceback, and the process ends by the signal (130 and 143 in a shell). A second signal ends it immediately.

    Signals are not handled outside the main thread, in a Jupyter kernel (whose stop button interrupts a cell), or if the program
    has its own handlers. Ignored SIGTERM and SIGHUP (``nohup``) stay ignored; ignored SIGINT, as in background jobs of a shell,
    stops the work too, since nobody sends it by accident. A KeyboardInterrupt raised by a library, also in an exception group,
    counts as SIGINT.

    Args:
        stop: asks the work to stop; called once, on the event loop.
        left: a sentence about what the work leaves behind.

    Raises:
        asyncio.CancelledError: instead of a KeyboardInterrupt in the block.
    """
    global _interrupts
    is_main = threading.current_thread() is threading.main_thread()
    is_owned = is_main and not in_kernel()
    owner = (_interrupts if is_owned else None) or Interrupts(asyncio.get_running_loop())
    if is_owned:
        _interrupts = owner
        owner.enter(stop, left)
    try:
        with owner.cancelling():
            yield owner
    finally:
        if is_owned and owner.leave(stop, left):
            _interrupts = None


def run_to_end(work: Coroutine[Any, Any, Result]) -> Result:
    """:func:`asyncio.run` for a program that does nothing else: a signal cancels it, wherever it is.

    Raises:
        KeyboardInterrupt: after SIGINT; :class:`Terminated` after SIGTERM or SIGHUP.
    """

    async def ended() -> Result:
        task = asyncio.current_task()
        assert task is not None
        with ending_cleanly(task.cancel):
            return await work

    return asyncio.run(ended())


def exit_status(ending: KeyboardInterrupt) -> int:
    """Exit status of a program ended by a signal: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + (ending.received if isinstance(ending, Terminated) else signal.SIGINT)


def exit_with(status: int) -> NoReturn:
    """``sys.exit``. After a signal it skips Python's finalization: threads still running could abort the process (Rust) or change its
    exit status."""
    if status > 128:
        _settle_process()
        os._exit(status)
    sys.exit(status)


def _settle_process() -> None:
    """Runs exit handlers and flushes the standard streams, as Python does at exit."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _end_by_signal(number: signal.Signals) -> NoReturn:
    """Ends the process as the signal would have, so that a shell or scheduler sees the cause."""
    _settle_process()
    if os.name == "posix":
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    os._exit(128 + number)  # reached in a container, where signals do not end process 1


def take_start_of_program() -> None:
    """Makes signals that nothing else handles end the process immediately, with one line: for a command that is still importing,
    or has finished its work."""
    for number in _NUMBERS:
        if _may_be_replaced(number, signal.getsignal(number)):
            signal.signal(number, end_at_once)


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """Ends the process immediately; files on disk are consistent at any time."""
    with suppress(Exception):
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a live bar hides the cursor
        print_line("Stopped immediately.", sys.stderr)
        sys.stdout.flush()
    os._exit(128 + number)


def is_interrupt(error: BaseException) -> bool:
    """Whether it is a KeyboardInterrupt, alone or in an exception group."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_interrupt, error.exceptions))
    return isinstance(error, KeyboardInterrupt)


def in_kernel() -> bool:
    """Whether this is a Jupyter kernel."""
    # Kernels have imported IPython already; elsewhere it need not be imported.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


def _may_be_replaced(number: signal.Signals, handler: Any) -> bool:
    """Whether a handler is a default (Python's or asyncio's) or ours."""
    if handler in (signal.SIG_DFL, end_at_once):
        return True
    if number != signal.SIGINT:
        return False
    return handler in (signal.SIG_IGN, signal.default_int_handler) or _runner_of(handler) is not None


def _runner_of(handler: Any) -> asyncio.Runner | None:
    """The runner whose handler this is, if :func:`asyncio.run` installed it."""
    runner = getattr(getattr(handler, "func", None), "__self__", None)
    return runner if isinstance(runner, asyncio.Runner) else None


def _has_come(handler: Any) -> bool:
    """Whether the handler of :func:`asyncio.run` has received a SIGINT."""
    return getattr(_runner_of(handler), "_interrupt_count", 0) > 0


def _end_program(received: signal.Signals, left: str) -> None:
    """Raises the ending exception; as a loop callback, since the loop lets only KeyboardInterrupt and SystemExit out."""
    text, shown = f"Stopped by {received.name}. {left}".rstrip(), sys.excepthook
    error = KeyboardInterrupt(text) if received == signal.SIGINT else Terminated(text, received)

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is not error:
            return shown(kind, value, trace)
        print_line(text, sys.stderr)
        _end_by_signal(received)

    sys.excepthook = hook
    raise error
