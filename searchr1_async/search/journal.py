"""Keeps embedded vectors on disk until they are in the store, so that nothing is embedded twice."""

from __future__ import annotations

import hashlib
import shutil
import struct
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from searchr1_async.boundary.paths import write_all
from searchr1_async.search.embedders.base import Vectors

KEY_BYTES = 16
_MAGIC = b"SR1VEC01"
_HEADER = struct.Struct("<8s16sI")
"""Magic, the embedder's hash, and the dimension; followed by a CRC-32."""
_CRC = struct.Struct("<I")
_SUFFIX = ".vectors"


def key_of(passage_id: str, text: str) -> bytes:
    """Hash of a passage's id and its embedded text."""
    content = f"{passage_id}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


class Journal:
    """One append-only file per window of passages, deleted once the window is in the store.

    A record is a key, a vector and their CRC-32. Survives kills: a torn record at the end of a file is truncated. Does not
    fsync, so a power failure may lose recent vectors. Files of another embedder (by fingerprint) or dimension are deleted.

    Blocks on the disk: call it in a worker thread. Thread-safe.
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
        """All intact vectors on disk, by key; truncates torn ends. Raises OSError."""
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
        """Adds a file's vectors to ``found`` and returns its intact bytes; None for a foreign file."""
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
        """Appends vectors of a window. Raises OSError."""
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
                except OSError:  # full disk: a torn record would hide later ones
                    file.truncate(before)
                    raise

    def forget(self, window: int) -> None:
        """Deletes a window that is in the store."""
        with self._lock:
            self._file(window).unlink(missing_ok=True)

    def clear(self) -> None:
        with self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, window: int) -> Path:
        return self._folder / f"{window:09d}{_SUFFIX}"
