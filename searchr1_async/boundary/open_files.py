"""How many files and connections this process may have open: raised as far as the system lets it, and what that allows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

WANTED = 65536
"""Files; more than any run needs."""
RESERVE = 96
"""Files for everything but sampling: training calls, the search, records, the view, libraries that are loaded late."""
POSTING = 400
"""Requests that the SDK posts at once; each holds a connection of its own for that, besides the one on which it waits."""


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """What this process may open."""

    limit: int | None
    """Files at once; None where the system tells none (Windows)."""
    used: int
    """Of them."""

    @property
    def requests(self) -> int | None:
        """Sampling requests that may be on their way at once; None for any number."""
        if self.limit is None:
            return None
        left = self.limit - self.used - min(RESERVE, self.limit // 4)
        return max(1, left // 2 if left < 2 * POSTING else left - POSTING)

    def warning(self, wanted: int) -> str | None:
        """What to tell a user whose run would send ``wanted`` requests at once; None where that is allowed."""
        most = self.requests
        if most is None or most >= wanted:
            return None
        return (
            f"this process may open {self.limit:,} files ({self.used:,} are open), so that at most {most:,} sampling requests "
            f"are sent at once, where the run allows {wanted:,}: raise the hard limit (ulimit -Hn, or nofile in limits.conf) for more"
        )


def raise_limit() -> OpenFiles:
    """Raises the limit of open files as far as allowed, and returns it. Cheap; call it whenever work begins."""
    try:
        import resource
    except ImportError:  # Windows
        return OpenFiles(None, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    # macOS says "unlimited" and takes no more than 10,240 (OPEN_MAX) where the kernel's own limit is lower.
    for value in (wanted, min(wanted, 10240)):
        if soft == resource.RLIM_INFINITY or soft >= value:
            break
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (value, hard))
            break
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OpenFiles(None if soft == resource.RLIM_INFINITY else soft, _used())


def _used() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return sum(1 for _ in Path(folder).iterdir())
    return 64
