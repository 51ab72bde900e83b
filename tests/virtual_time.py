"""An event loop whose clock jumps to the next timer whenever nothing else is to be done: hours pass in no time.

For code that waits only for timers and for other tasks; a thread or a socket would be waited for in vain.
"""

from __future__ import annotations

import asyncio


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._virtual = 1_000.0

    def time(self) -> float:
        return self._virtual

    def _run_once(self) -> None:
        # The loop's own lists: their names have been the same since Python 3.4.
        timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        if timers and not self._ready:  # type: ignore[attr-defined]
            self._virtual = max(self._virtual, min(timers))
        super()._run_once()  # type: ignore[misc]
