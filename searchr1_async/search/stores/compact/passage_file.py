"""The passages of an index: lines of JSON in one file, and where each of them begins in another.

Lines are found by two reads and open with any tool. As Arrow the same text has to be mapped in pieces, whose opening checks all of
their text (40 MB for 65,536 passages); as Parquet a row costs the page that it is in.
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
    """Appends passages behind those that are kept.

    Args:
        folder: of the index.
        rows: what is kept already; whatever stands behind is cut off.

    Raises:
        OSError: the files cannot be written, or are shorter than what is said to be kept.
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
        """Writes passages; they are safe from a kill, not from a power cut before :meth:`sync`."""
        lines = [_line(passage) for passage in passages]
        ends = self._end + np.cumsum([len(line) for line in lines], dtype=np.uint64)
        self._lines.write(b"".join(lines))
        self._offsets.write(ends.astype("<u8").tobytes())
        self._end = int(ends[-1]) if lines else self._end

    def sync(self) -> None:
        """Puts on the disk what was written."""
        self._lines.sync()
        self._offsets.sync()

    def close(self) -> None:
        """Lets go of the files."""
        self._lines.close()
        self._offsets.close()


class PassageFile:
    """The passages, read a few at a time from anywhere.

    Args:
        folder: of the index.
        rows: passages in it.

    Raises:
        OSError: a file is missing.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._name = str(folder / PASSAGES_NAME)
        self._offsets = np.memmap(folder / OFFSETS_NAME, "<u8", "r", shape=(rows + 1,))
        self._file = (folder / PASSAGES_NAME).open("rb", buffering=0)

    def read(self, row: int, score: float = 0.0) -> Passage:
        """A passage with its similarity.

        Raises:
            StoreError: the file is broken there.
        """
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        try:
            own_id, title, text = orjson.loads(os.pread(self._file.fileno(), end - start, start))
            return Passage(own_id, title, text, score)
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{self._name} is broken at row {row:,}: verify the index, or copy it again") from error

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def _line(passage: Passage) -> bytes:
    fields = [passage.id, passage.title, passage.text]
    try:
        return orjson.dumps(fields) + b"\n"
    except orjson.JSONEncodeError:  # lone surrogates are no UTF-8
        return orjson.dumps([field.encode("utf-8", "replace").decode() for field in fields]) + b"\n"
