"""Interrupts have one owner: SIGINT, SIGTERM and SIGHUP end the work of this process cleanly, wherever they land.

Left alone, Python raises :class:`KeyboardInterrupt` at whatever it just executes, and libraries raise it in their worker threads
(polars, where a shell started the process with SIGINT ignored). Here a signal raises nothing: it asks the work to stop, on the
event loop, and the program ends when the work has closed everything.
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
from typing import Any, NoReturn, TypeVar

from searchr1_async.boundary.streams import print_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

REPEAT_SECONDS = 0.5
"""A signal that comes again so soon is the same one: ``timeout`` and ``uv run`` send it to the process and to its group."""
_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ASYNCIO = logging.getLogger("asyncio")


def _is_kept_record(record: logging.LogRecord) -> bool:
    """A log filter for asyncio: drops errors of cancelled requests, which no one awaits any more."""
    return "exception was never retrieved" not in record.getMessage()


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP ended the work."""

    def __init__(self, text: str, received: signal.Signals) -> None:
        super().__init__(text)
        self.received = received


class Interrupts:
    """The signals of this process while work runs that can stop cleanly. There is one at a time: :func:`ending_cleanly`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.received: signal.Signals | None = None
        """The first signal that came."""
        self._loop = loop
        self._at = 0.0
        self._works: list[tuple[Callable[[], object], str]] = []
        self._left: list[str] = []
        self._before: dict[signal.Signals, Any] = {}

    def enter(self, stop: Callable[[], object], left: str) -> None:
        """Work has begun; the first takes the signals over."""
        self._works.append((stop, left))
        _ASYNCIO.removeFilter(_is_kept_record)  # where a program went on after its KeyboardInterrupt
        for number in _NUMBERS if len(self._works) == 1 else ():
            handler = signal.getsignal(number)
            if _may_be_replaced(number, handler):
                self._before[number] = handler
                signal.signal(number, self._handle)
                if _has_come(handler):  # a moment ago, and cancels the task that begins this work
                    self.received = signal.SIGINT
                    self._loop.call_soon(self._stop)

    def leave(self, stop: Callable[[], object], left: str) -> bool:
        """Work has ended; with the last the signals are given back, and after a signal the program ends. Whether it was the last."""
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
        """A block whose KeyboardInterrupt, also within exception groups, counts as SIGINT.

        Raises:
            asyncio.CancelledError: in place of it.
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
        if not self._loop.is_running():  # between two cells of a terminal's IPython
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
                logger.exception("work could not be asked to stop; a second signal ends the process at once")

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
    """While the block runs, the first SIGINT, SIGTERM or SIGHUP calls ``stop``, after which the block is to end soon.

    Once every such block has ended, the signals are given back and the program ends: KeyboardInterrupt, for SIGTERM and SIGHUP
    its subclass :class:`Terminated`, comes out of the event loop and cancels whatever else it runs. Uncaught, it is one line
    without a traceback, and the process ends by the signal (130 and 143 in a shell). A second signal ends it at once.

    Signals are left alone outside of the main thread, in a Jupyter kernel, whose stop button belongs to a cell, and where the
    program has handlers of its own. SIGTERM and SIGHUP that are ignored (``nohup``) stay so; SIGINT, which shells have
    background processes ignore, stops the work too: nobody sends it by accident. A KeyboardInterrupt that a library
    raises all the same is taken as SIGINT, also where an exception group holds it.

    Args:
        stop: asks the work to end; called on the event loop, once.
        left: a sentence on what the work leaves behind.

    Raises:
        asyncio.CancelledError: in place of a KeyboardInterrupt within the block.
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
    """:func:`asyncio.run` for a program that is only this work: a signal cancels it, wherever it is.

    Raises:
        KeyboardInterrupt: SIGINT came; :class:`Terminated` where SIGTERM or SIGHUP did.
    """

    async def ended() -> Result:
        task = asyncio.current_task()
        assert task is not None
        with ending_cleanly(task.cancel):
            return await work

    return asyncio.run(ended())


def exit_status(ending: KeyboardInterrupt) -> int:
    """Of a program that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + (ending.received if isinstance(ending, Terminated) else signal.SIGINT)


def exit_with(status: int) -> NoReturn:
    """``sys.exit``. After a signal without Python's finalization: what was cut may still run in threads, which then abort the
    process (Rust's do), or change its exit status (one that runs ``exec`` on a text makes 1 of 130)."""
    if status > 128:
        _settle_process()
        os._exit(status)
    sys.exit(status)


def _settle_process() -> None:
    """What Python does at the end of a process for others: their exit handlers, and the buffers of the standard streams."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _end_by_signal(number: signal.Signals) -> NoReturn:
    """Ends the process as the signal itself would have, so that a shell or a scheduler sees why."""
    _settle_process()
    if os.name == "posix":
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container is not ended by its own signal


def take_start_of_program() -> None:
    """From here on a signal that nobody else takes ends the process at once, in one line: for a command that is being imported,
    or has done its work."""
    for number in _NUMBERS:
        if _may_be_replaced(number, signal.getsignal(number)):
            signal.signal(number, end_at_once)


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """Ends the process in the middle of whatever it does: what is on disk is whole at every moment."""
    with suppress(Exception):
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a live bar hides the cursor
        print_line("Stopped at once.", sys.stderr)
        sys.stdout.flush()
    os._exit(128 + number)


def is_interrupt(error: BaseException) -> bool:
    """Whether the user interrupted the work: a KeyboardInterrupt, alone or within an exception group."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_interrupt, error.exceptions))
    return isinstance(error, KeyboardInterrupt)


def in_kernel() -> bool:
    """Whether this is a Jupyter kernel."""
    # In a kernel IPython is there already; elsewhere it is not imported for the asking.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


def _may_be_replaced(number: signal.Signals, handler: Any) -> bool:
    """Whether a handler is nobody's own: Python's, asyncio's or ours."""
    if handler in (signal.SIG_DFL, end_at_once):
        return True
    if number != signal.SIGINT:
        return False
    return handler in (signal.SIG_IGN, signal.default_int_handler) or _runner_of(handler) is not None


def _runner_of(handler: Any) -> asyncio.Runner | None:
    """Whose handler this is, where :func:`asyncio.run` has set it."""
    runner = getattr(getattr(handler, "func", None), "__self__", None)
    return runner if isinstance(runner, asyncio.Runner) else None


def _has_come(handler: Any) -> bool:
    """Whether the handler of :func:`asyncio.run` has had a SIGINT."""
    return getattr(_runner_of(handler), "_interrupt_count", 0) > 0


def _end_program(received: signal.Signals, left: str) -> None:
    """A callback of the event loop, out of which it raises only KeyboardInterrupt and SystemExit."""
    text, shown = f"Stopped by {received.name}. {left}".rstrip(), sys.excepthook
    error = KeyboardInterrupt(text) if received == signal.SIGINT else Terminated(text, received)

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is not error:
            return shown(kind, value, trace)
        print_line(text, sys.stderr)
        _end_by_signal(received)

    sys.excepthook = hook
    raise error
