"""Standard output and error that may be closed, a pipe that nobody reads, or a terminal that is gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_GONE = (OSError, ValueError)
"""A pipe or terminal that is gone; a file that is closed."""


def print_line(text: str, stream: TextIO | None) -> bool:
    """Writes a line at once; whether somebody may read it.

    Args:
        stream: None, as ``sys.stderr`` is in a process that was started without one, takes nothing.
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
    """The outermost block of a command: what it could not write to is replaced by nothing, so that Python's own flush at the
    end of the process does not complain, nor change its exit status."""
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
        except _GONE:  # no file, or closed
            return
