"""Standard streams that may be closed, a broken pipe, or a lost terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

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
