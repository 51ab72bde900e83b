"""Raises the limit of open files and connections, and derives how many requests it allows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

WANTED = 65536
"""More than any run needs."""
RESERVE = 96
"""Files for everything but sampling: training calls, search, records, the view, late imports."""
POSTING = 400
"""Requests that the SDK posts concurrently; each needs a second connection for the post."""


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """The limit of open files, and its use."""

    limit: int | None
    """Maximum open files; None if the system reports none (Windows)."""
    used: int
    """Files open now."""

    @property
    def requests(self) -> int | None:
        """Sampling requests that may be in flight at once; None for unlimited."""
        if self.limit is None:
            return None
        left = self.limit - self.used - min(RESERVE, self.limit // 4)
        return max(1, left // 2 if left < 2 * POSTING else left - POSTING)

    def warning(self, wanted: int) -> str | None:
        """A warning for a run that wants this many concurrent requests; None if the limit allows them."""
        most = self.requests
        if most is None or most >= wanted:
            return None
        return (
            f"this process may open {self.limit:,} files ({self.used:,} are open), which allows {most:,} concurrent sampling "
            f"requests instead of {wanted:,}: raise the hard limit (ulimit -Hn, or nofile in limits.conf)"
        )


def raise_limit() -> OpenFiles:
    """Raises the limit of open files as far as allowed, and returns it. Cheap; call it whenever work starts."""
    try:
        import resource
    except ImportError:  # Windows
        return OpenFiles(None, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    # macOS reports "unlimited", but accepts at most 10,240 (OPEN_MAX) if the kernel's limit is lower.
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
