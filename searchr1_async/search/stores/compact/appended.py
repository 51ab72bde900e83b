"""An append-only file that resumes from a known size."""

from __future__ import annotations

import os
from pathlib import Path


class AppendedFile:
    """A file truncated to ``size`` bytes, then appended to.

    Raises:
        OSError: it cannot be opened, or is shorter.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        if self._file.seek(0, 2) < size:
            self._file.close()
            raise OSError(f"{path} is shorter than the recorded progress: delete the folder and start again")
        self._file.seek(size)
        self._file.truncate()

    def write(self, content: bytes) -> None:
        """Appends and flushes; survives a kill of the process."""
        self._file.write(content)
        self._file.flush()

    def sync(self) -> None:
        """Flushes to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
