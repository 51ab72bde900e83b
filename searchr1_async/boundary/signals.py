"""SIGINT, SIGTERM and SIGHUP, and the standard streams of this process.

The signals raise nothing here, wherever Python or a library's thread happens to be: they ask the work, on the event loop, to stop, and
the program ends once the work has closed everything.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO

REPEAT_SECONDS = 0.5
"""Signals repeated this soon count as one: ``timeout`` and ``uv run`` signal both the process and its group."""
_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_GONE = (OSError, ValueError)
"""A broken pipe or lost terminal; a closed file."""


def print_line(text: str, stream: TextIO | None) -> None:
    """Writes and flushes a line, if the stream still exists."""
    if stream is not None:
        with suppress(*_GONE):
            stream.write(f"{text}\n")
            stream.flush()


def settle_streams() -> None:
    """Flushes the standard streams at the end of a program; a broken one neither complains at exit nor changes its status."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except _GONE:
            with suppress(*_GONE):  # not a file, or closed
                number = stream.fileno()
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, number)
                os.close(nothing)


class Terminated(KeyboardInterrupt):
    """The work was ended by a signal."""

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

    def enter(self, work: tuple[Callable[[], object], str]) -> None:
        """Registers work; the first registration installs the handlers."""
        self._works.append(work)
        for number in _NUMBERS if len(self._works) == 1 else ():
            if _may_be_replaced(number, handler := signal.getsignal(number)):
                self._before[number] = handler
                signal.signal(number, self._handle)

    def leave(self, work: tuple[Callable[[], object], str]) -> bool:
        """Unregisters work; returns whether it was the last, which restores the handlers and, after a signal, ends the program."""
        self._works.remove(work)
        if self.received is not None:
            self._left.append(work[1])
        if self._works:
            return False
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        if self.received is not None:
            self._loop.call_soon(_end_program, self.received, " ".join(filter(None, self._left)))
        return True

    @contextmanager
    def cancelling(self) -> Iterator[None]:
        """Cancels the block by a KeyboardInterrupt, also in exception groups: polars raises it in its threads."""
        try:
            yield
        except BaseException as error:
            if not is_interrupt(error):
                raise
            self.received = self.received or signal.SIGINT
            raise asyncio.CancelledError from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and not self._loop.is_running():  # a cell of IPython that awaits nothing
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
            self._loop.call_soon_threadsafe(self._stop)
        elif now - self._at >= REPEAT_SECONDS:
            end_at_once(number)

    def _stop(self) -> None:
        # Nothing awaits the requests that are cancelled now.
        logging.getLogger("asyncio").addFilter(lambda each: "exception was never retrieved" not in each.getMessage())
        for stop, _ in list(self._works):
            stop()


_interrupts: Interrupts | None = None


@contextmanager
def ending_cleanly(stop: Callable[[], object], left: str = "") -> Iterator[Interrupts]:
    """The first SIGINT, SIGTERM or SIGHUP during the block calls ``stop``; the block should then end soon.

    When all such blocks have ended, the handlers are restored and the program ends: :class:`Terminated` leaves the event loop;
    uncaught, it prints one line, and the process ends by the signal (130, 143 or 129 in a shell). A second signal ends it immediately.

    Not outside the main thread, in a Jupyter kernel (whose stop button interrupts a cell), or if the program has its own handlers.
    Ignored SIGTERM and SIGHUP (``nohup``) stay ignored; ignored SIGINT, as in background jobs of a shell, stops the work too.

    Args:
        stop: asks the work to stop; called once, on the event loop.
        left: a sentence about what the work leaves behind.

    Raises:
        asyncio.CancelledError: instead of a KeyboardInterrupt.
    """
    global _interrupts
    is_owned = threading.current_thread() is threading.main_thread() and not in_kernel()
    owner = (_interrupts if is_owned else None) or Interrupts(asyncio.get_running_loop())
    if is_owned:
        _interrupts = owner
        owner.enter((stop, left))
    try:
        with owner.cancelling():
            yield owner
    finally:
        if is_owned and owner.leave((stop, left)):
            _interrupts = None


def exit_status(ending: KeyboardInterrupt) -> int:
    """Exit status of a program ended by a signal: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + (ending.received if isinstance(ending, Terminated) else signal.SIGINT)


def exit_with(status: int) -> NoReturn:
    """``sys.exit``; for a status over 128 by that signal, so that a shell or scheduler sees the cause.

    Without Python's finalization then, in which threads still running could abort the process (Rust).
    """
    if status <= 128:
        sys.exit(status)
    with suppress(Exception):
        atexit._run_exitfuncs()
    settle_streams()
    if os.name == "posix":
        signal.signal(status - 128, signal.SIG_DFL)
        os.kill(os.getpid(), status - 128)
    os._exit(status)  # reached in a container, where signals do not end process 1


def end_at_once(number: int) -> NoReturn:
    """Ends the process immediately; files on disk are consistent at any time."""
    try:
        is_terminal = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
        print_line(
            ("\x1b[?25h" if is_terminal else "") + "Stopped immediately.", sys.stderr
        )  # a live bar hides the cursor
    finally:  # a signal in the middle of a write to the same stream is a RuntimeError
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
    """Whether a handler is a default: Python's, or that of :func:`asyncio.run`."""
    if number != signal.SIGINT:
        return handler == signal.SIG_DFL
    is_asyncio = isinstance(getattr(getattr(handler, "func", None), "__self__", None), asyncio.Runner)
    return is_asyncio or handler in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)


def _end_program(received: signal.Signals, left: str) -> None:
    """Raises the ending exception; as a loop callback, since the loop lets only KeyboardInterrupt and SystemExit out."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(value, Terminated):
            return shown(kind, value, trace)
        print_line(str(value), sys.stderr)
        exit_with(128 + value.received)

    sys.excepthook = hook
    raise Terminated(f"Stopped by {received.name}. {left}".rstrip(), received)
