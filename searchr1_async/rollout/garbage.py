"""Python's garbage collector kept from stopping the event loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (1_000, 10, 1_000)
"""New objects until the youngest are looked through, how often until the middle ones are, and how often these until all are.
What an episode leaves behind in cycles dies young; a look through all that 1,024 episodes hold stopped the loop for 178 ms, 4,096
for 389 ms, and found nothing. The young ones hold long lists of tokens: 10,000 of them took up to 97 ms."""

_users = 0
_before = gc.get_threshold()


@contextmanager
def rare_collections() -> Iterator[None]:
    """While the block runs, all that was there before is left out of collections, and full ones are rare.

    May be nested, and entered by several runs of a process; the last to leave puts things back.
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
