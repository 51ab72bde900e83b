"""Keeps Python's garbage collector from blocking the event loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (1_000, 10, 1_000)
"""Collection thresholds of the three generations. Full collections are rare: they find nothing in live episodes and block for
hundreds of ms. The youngest stays small, since its objects hold long token lists."""

_users = 0
_before = gc.get_threshold()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Freezes existing objects and makes full collections rare while the block runs.

    Reentrant, also across concurrent runs in a process; the last exit restores the settings.
    """
    global _users, _before
    if not _users:
        _before = gc.get_threshold()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_THRESHOLDS)
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            gc.set_threshold(*_before)
            gc.unfreeze()
