"""The passages of an index: JSON lines in one file, byte offsets in another.

A passage takes two reads, and any tool can open the file. Arrow validates whole chunks on opening; Parquet reads a page per row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.stores.compact.appended import AppendedFile
from searchr1_async.search.stores.compact.layout import OFFSETS_NAME, PASSAGES_NAME

OFFSET_BYTES = 8


class PassageWriter:
    """Appends passages after those already kept.

    Args:
        folder: index folder.
        rows: rows already kept; anything after them is truncated.

    Raises:
        OSError: the files cannot be written, or are shorter than ``rows``.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._offsets = AppendedFile(folder / OFFSETS_NAME, OFFSET_BYTES * (rows + 1) if rows else 0)
        self._end = 0
        if rows:
            self._end = int(np.fromfile(folder / OFFSETS_NAME, "<u8", 1, offset=OFFSET_BYTES * rows)[0])
        else:
            self._offsets.write(bytes(OFFSET_BYTES))
        try:
            self._lines = AppendedFile(folder / PASSAGES_NAME, self._end)
        except OSError:
            self._offsets.close()
            raise

    def append(self, passages: Sequence[Passage]) -> None:
        """Writes passages. They survive a kill; surviving a power cut takes :meth:`sync`."""
        lines = [_line(passage) for passage in passages]
        ends = self._end + np.cumsum([len(line) for line in lines], dtype=np.uint64)
        self._lines.write(b"".join(lines))
        self._offsets.write(ends.astype("<u8").tobytes())
        self._end = int(ends[-1]) if lines else self._end

    def sync(self) -> None:
        """Flushes to disk."""
        self._lines.sync()
        self._offsets.sync()

    def close(self) -> None:
        self._lines.close()
        self._offsets.close()


class PassageFile:
    """Random access to the passages.

    Args:
        folder: index folder.
        rows: number of passages.

    Raises:
        OSError: a file is missing.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._name = str(folder / PASSAGES_NAME)
        self._offsets = np.memmap(folder / OFFSETS_NAME, "<u8", "r", shape=(rows + 1,))
        self._file = (folder / PASSAGES_NAME).open("rb", buffering=0)

    def read(self, row: int, score: float = 0.0) -> Passage:
        """The passage of a row, with the given score.

        Raises:
            StoreError: the file is corrupt at this row.
        """
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        try:
            own_id, title, text = orjson.loads(os.pread(self._file.fileno(), end - start, start))
            return Passage(own_id, title, text, score)
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{self._name} is corrupt at row {row:,}: verify the index, or copy it again") from error

    def close(self) -> None:
        self._file.close()


def _line(passage: Passage) -> bytes:
    fields = [passage.id, passage.title, passage.text]
    try:
        return orjson.dumps(fields) + b"\n"
    except orjson.JSONEncodeError:  # lone surrogates are not valid UTF-8
        return orjson.dumps([field.encode("utf-8", "replace").decode() for field in fields]) + b"\n"
