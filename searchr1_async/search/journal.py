"""Vectors on disk from their request's answer until they are in the store: what was embedded is not embedded again."""

from __future__ import annotations

import hashlib
import shutil
import struct
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from searchr1_async.files import write_all
from searchr1_async.search.embedders.base import Vectors

KEY_BYTES = 16
_MAGIC = b"SR1VEC01"
_HEADER = struct.Struct("<8s16sI")
"""Magic, the embedder's hash, and the dimension; followed by a CRC-32."""
_CRC = struct.Struct("<I")
_SUFFIX = ".vectors"


def key_of(passage_id: str, text: str) -> bytes:
    """Names a passage and what was embedded of it."""
    content = f"{passage_id}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


class Journal:
    """One append-only file a window of passages, deleted when the window is in the store.

    A record is a key, a vector and their CRC-32. A process may be killed at any moment: a record cut short ends its
    file, and is cut off before the file is appended to. Nothing is synced to the disk: a kill loses nothing, a power cut
    what the system had not written yet. A file of another embedder or dimension is deleted.

    All functions block on the disk: call them in a worker thread. Thread-safe.

    Args:
        folder: made when something is first appended.
        embedder: fingerprint of what made the vectors.
        dimension: numbers a vector.
    """

    def __init__(self, folder: Path, embedder: str, dimension: int) -> None:
        self._folder = folder
        identity = hashlib.blake2b(embedder.encode(), digest_size=16).digest()
        header = _HEADER.pack(_MAGIC, identity, dimension)
        self._header = header + _CRC.pack(zlib.crc32(header))
        self._dimension = dimension
        self._record = KEY_BYTES + 4 * dimension + _CRC.size
        self._lock = threading.Lock()

    def recall(self) -> dict[bytes, Vectors]:
        """Every vector that is whole on disk, by its key; torn ends are cut off.

        Raises:
            OSError: the folder cannot be read.
        """
        found: dict[bytes, Vectors] = {}
        with self._lock:
            for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
                if (size := self._read(file, found)) is None:
                    file.unlink()
                elif size < file.stat().st_size:
                    with file.open("r+b") as torn:
                        torn.truncate(size)
        return found

    def _read(self, file: Path, found: dict[bytes, Vectors]) -> int | None:
        """The bytes of a file that are whole, with their vectors put into ``found``; None for a foreign file."""
        content = file.read_bytes()
        if not content.startswith(self._header):
            return None
        position = len(self._header)
        while len(record := content[position : position + self._record]) == self._record:
            body, checksum = record[: -_CRC.size], record[-_CRC.size :]
            if _CRC.unpack(checksum)[0] != zlib.crc32(body):
                break
            found[body[:KEY_BYTES]] = np.frombuffer(body, "<f4", offset=KEY_BYTES).astype(np.float32)
            position += self._record
        return position

    def append(self, window: int, keys: Sequence[bytes], vectors: Vectors) -> None:
        """Keeps the vectors of some passages of a window.

        Raises:
            OSError: they cannot be written.
        """
        records = bytearray()
        for key, vector in zip(keys, np.ascontiguousarray(vectors, "<f4"), strict=True):
            body = key + vector.tobytes()
            records += body + _CRC.pack(zlib.crc32(body))
        with self._lock:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file(window).open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    write_all(file, records if before else self._header + records)
                except OSError:  # a full disk: the half that was written would hide what is appended later
                    file.truncate(before)
                    raise

    def forget(self, window: int) -> None:
        """The window is in the store."""
        with self._lock:
            self._file(window).unlink(missing_ok=True)

    def clear(self) -> None:
        """All is in the store."""
        with self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, window: int) -> Path:
        return self._folder / f"{window:09d}{_SUFFIX}"
