"""A file that grows at its end, and goes on from a known size after a kill."""

from __future__ import annotations

import os
from pathlib import Path


class AppendedFile:
    """A file that is cut to so many bytes, and grows from there.

    Raises:
        OSError: it cannot be opened, or is shorter.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        if self._file.seek(0, 2) < size:
            self._file.close()
            raise OSError(f"{path} is shorter than what was written to it: delete the folder and begin again")
        self._file.seek(size)
        self._file.truncate()

    def write(self, content: bytes) -> None:
        """Appends; a kill of the process loses nothing of it from here on."""
        self._file.write(content)
        self._file.flush()

    def sync(self) -> None:
        """Puts it on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()
