"""Finished groups kept on disk until a recorded step contains them, so a killed run need not redo them.

::

    <folder>/000012-1a2b3c4d.parquet   the groups of one write (:func:`~searchr1_async.episodes.table.kept_groups_frame`);
                                       the name holds a number and the CRC-32 of the file's content

Parts are written atomically and never changed: a forgotten group's part is deleted, or replaced by one without that group. A part
whose content differs from its checksum (a damaged disk) is skipped, and its groups are rolled out again.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import polars as pl

from searchr1_async.boundary.paths import parquet_bytes, remove_leftovers, write_atomically
from searchr1_async.boundary.tables import read_parquet
from searchr1_async.episodes.table import groups_from_frame, kept_groups_frame
from searchr1_async.episodes.types import Group

logger = logging.getLogger(__name__)

_PART = re.compile(r"(\d{6,})-([0-9a-f]{8})\.parquet")
_OLD_FORM = "*.groups"
"""Files of version 0.1.0, which are not read."""
_UNREADABLE = (pl.exceptions.PolarsError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Raised by a part that is intact but holds no groups."""


class UnlearnedGroups:
    """Finished groups that no recorded step contains yet, keyed by place.

    Methods block on disk I/O: call them in a worker thread. Thread-safe; one process at a time (the run's lock).

    Args:
        folder: created on first write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._lock = threading.Lock()
        self._places: dict[Path, set[int]] = {}
        """The places of each part; no place is in two."""
        self._next = max((number for number, _ in self._parts()), default=0) + 1

    def write(self, groups: Sequence[tuple[int, Group]]) -> None:
        """Stores finished groups by place, replacing stored ones of the same place. One call writes one part.

        Raises:
            OSError: the write failed (disk full); none of the groups is stored, earlier ones are unchanged.
        """
        if not groups:
            return
        latest = dict(groups)
        frame = kept_groups_frame(latest)
        with self._lock:
            path = self._write(frame)
            self._drop(latest)
            self._places[path] = set(latest)

    def load(self) -> dict[int, Group]:
        """The groups on disk, by place. Call it before :meth:`write`.

        A recorded step may contain some of them, if the process was killed before they were forgotten.

        Raises:
            OSError: the folder is not readable, or not writable when something must be forgotten.
        """
        found: dict[int, Group] = {}
        with self._lock:
            remove_leftovers(self._folder)
            self._remove_old_form()
            for _, path in self._parts():
                groups = _read(path)
                if groups is None:
                    path.unlink(missing_ok=True)
                    continue
                self._drop(groups)
                self._places[path] = set(groups)
                found |= groups
        return found

    def forget(self, places: Iterable[int]) -> None:
        """Drops groups that a recorded step contains or that are no longer needed; unknown places are ignored.

        Raises:
            OSError: the folder is not writable.
        """
        with self._lock:
            self._drop(set(places))

    def clear(self) -> None:
        """Deletes everything: the run starts over."""
        with self._lock:
            self._places.clear()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, frame: pl.DataFrame) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        content = parquet_bytes(frame)
        path = self._folder / f"{self._next:06d}-{zlib.crc32(content):08x}.parquet"
        write_atomically(path, content)
        self._next += 1
        return path

    def _drop(self, places: Collection[int]) -> None:
        """Deletes the parts of these places, after writing what else they hold anew. A kill in between leaves both."""
        for path, kept in list(self._places.items()):
            left = kept.difference(places)
            if left == kept:
                continue
            if left:
                self._places[self._write(read_parquet(path).filter(pl.col("place").is_in(left)))] = left
            del self._places[path]
            path.unlink(missing_ok=True)

    def _parts(self) -> list[tuple[int, Path]]:
        """Number and path, in write order."""
        if not self._folder.is_dir():
            return []
        named = ((_PART.fullmatch(path.name), path) for path in self._folder.iterdir())
        return sorted((int(name[1]), path) for name, path in named if name)

    def _remove_old_form(self) -> None:
        old = list(self._folder.glob(_OLD_FORM))
        if old:
            logger.warning(
                "%s holds finished groups in the form of version 0.1.0, which is no longer read: they are rolled out again",
                self._folder,
            )
        for path in old:
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[int, Group] | None:
    """The groups of a part; None if it is damaged or holds something else."""
    name = _PART.fullmatch(path.name)
    if name is None or f"{zlib.crc32(path.read_bytes()):08x}" != name[2]:
        logger.warning("%s is damaged: its groups are rolled out again", path)
        return None
    try:
        return groups_from_frame(read_parquet(path))
    except _UNREADABLE as error:
        logger.warning("%s holds no groups (%s): it is deleted", path, type(error).__name__)
        return None
