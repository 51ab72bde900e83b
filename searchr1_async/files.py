"""Files and folders shared by processes: atomic replacement and locks. Failed writes raise :class:`OSError`.

Imports nothing else of the package.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import anyio
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path whose file then replaces ``path`` atomically, also across a power cut.

    After a failed write (a full disk) the old file is unchanged and the temporary one removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file like :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Writes arrays like :func:`replacing`, as one file for ``numpy.load``."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]  # pyright matches it to numpy's bool option
    write_atomically(path, buffer.getvalue())


def folder_bytes(folder: Path) -> int:
    """Total size of a folder's files; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove_leftovers(folder: Path) -> None:
    """Removes the partial tables of processes killed in :func:`write_parquet`. No other process may be writing there."""
    for leftover in folder.glob(".*.parquet.*"):
        leftover.unlink(missing_ok=True)


def parquet_bytes(frame: pl.DataFrame) -> bytes:
    """A table as the content of a Parquet file. In memory, because polars reports a full disk with an error that is no OSError."""
    buffer = io.BytesIO()
    # The default level, 3, takes twice the time for 3 % less.
    frame.write_parquet(buffer, compression="zstd", compression_level=1)
    return buffer.getvalue()


def write_parquet(path: Path, frame: pl.DataFrame) -> None:
    """Writes a table like :func:`write_atomically`."""
    write_atomically(path, parquet_bytes(frame))


def write_all(file: BinaryIO, content: bytes | bytearray) -> None:
    """Writes to an unbuffered file, whose writes may be partial on a nearly full disk."""
    written = 0
    while written < len(content):
        written += file.write(bytes(content[written:]) if written else content)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename survives a power cut."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.asynccontextmanager
async def only_one(path: Path, work: str) -> AsyncIterator[None]:
    """Waits for ``<path>.lock`` and holds it during the block.

    Args:
        path: the file or folder to work on.
        work: what another process may be doing, for the log: ``"builds the index in …"``.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"), thread_local=False)
    logged = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if not logged:
                logger.info("another process %s: waiting for it", work)
                logged = True
            await anyio.sleep(0.25)
    try:
        yield
    finally:
        lock.release()
