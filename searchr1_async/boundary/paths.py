"""Paths of users, made absolute once; files that are replaced atomically; and the limit of open files.

Failed writes raise :class:`OSError`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import anyio
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from platformdirs import user_cache_dir

from searchr1_async.boundary.settings import check, shown, shown_with_kind
from searchr1_async.errors import ConfigurationError

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)

WANTED = 65536
"""More than any run needs."""
RESERVE = 96
"""Files for everything but sampling: training calls, search, records, the view, late imports."""
POSTING = 400
"""Requests that the SDK posts concurrently; each needs a second connection for the post."""


def absolute_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Makes a user's path absolute, with ``~`` and ``~user`` expanded; links and ``..`` are kept, no character is a wildcard.

    Raises:
        ConfigurationError: not a path, blank, or its home or current folder is unknown; naming ``name``.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise ConfigurationError(f"{name} is {shown_with_kind(path)}: expected a path, as text or Path")
    problem, found = "" if text.strip() else "blank text", Path()
    try:
        found = Path(text).expanduser().absolute()
        if any(len(os.fsencode(part)) > 255 for part in found.parts):
            problem = "a name longer than 255 bytes"
        if "\0" in text:
            problem = "a zero byte"
    except (RuntimeError, OSError, ValueError) as error:  # no such user or HOME; a deleted current folder; a surrogate
        problem = str(error)
    if problem:
        raise ConfigurationError(f"{name} is {shown(text)}: expected the full path of a file or folder, not {problem}")
    return found


def as_path(name: str, value: Any) -> Path:
    """:func:`absolute_path` as an annotation check (:mod:`~searchr1_async.boundary.settings`)."""
    return absolute_path(value, name)


def path_argument(text: str) -> Path:
    """:func:`absolute_path` as an argparse type."""
    try:
        return absolute_path(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


FilePath = Annotated[str | Path, as_path]
"""A file or folder."""


def folder_at(text: str) -> Path | None:
    """The absolute path of a folder; None if it does not exist, such as for a model on a hub."""
    try:
        folder = absolute_path(text)
        return folder if folder.is_dir() else None
    except (ConfigurationError, OSError):  # blank, or too long for a path
        return None


def as_name_or_folder(name: str, value: Any) -> str:
    """The name of a model or tokenizer, or the absolute path of its local folder.

    Text is a folder if one exists with this name, or if it starts with ``~``, ``/``, ``./`` or ``../``.

    Raises:
        ConfigurationError: blank, neither text nor a path, or a folder that does not exist.
    """
    if not isinstance(value, os.PathLike):
        value = check(name, value, str)
        if not value.strip():
            raise ConfigurationError(f"{name} is {value!r}: expected a name or a folder")
        if not value.startswith(("~", "/", "./", "../")) and folder_at(value) is None:
            return value
    folder = absolute_path(value, name)
    if not folder.is_dir():
        raise ConfigurationError(f"{name} is {os.fspath(value)!r}, but the folder {folder} does not exist")
    return str(folder)


def shown_name(name: str) -> str:
    """A result of :func:`as_name_or_folder` for display: the name, or the folder's last part."""
    return Path(name).name if Path(name).is_absolute() else name


def shown_path(path: str | Path) -> str:
    """An absolute path for display: relative if it is in the current folder."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


NameOrFolder = Annotated[str | Path, as_name_or_folder]


def is_same_place(one: str, other: str) -> bool:
    """Whether two texts are the same name, or the same path from the current folder."""
    return one == other or absolute_path(one) == absolute_path(other)


def cache_folder() -> Path:
    """The package's cache folder, made if missing: in ``$XDG_CACHE_HOME`` or the platform's. Raises ConfigurationError."""
    try:
        folder = Path(user_cache_dir("searchr1_async", appauthor=False, opinion=False)).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"there is no cache folder for indexes and models ({error}): set XDG_CACHE_HOME to a folder that you can write to"
        ) from error
    return folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path whose file then replaces ``path``, also across a power cut; a failed write leaves the old file."""
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
    with contextlib.suppress(OSError):  # the rename itself; Windows cannot open a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


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


@contextlib.asynccontextmanager
async def only_one(path: Path, work: str) -> AsyncIterator[None]:
    """Waits for ``<path>.lock`` and holds it during the block; ``work`` is what another process may be doing, for the log."""
    lock = FileLock(path.with_name(f"{path.name}.lock"), thread_local=False, blocking=False)
    with contextlib.suppress(Timeout):
        lock.acquire()
    if not lock.is_locked:
        logger.info("another process %s: waiting for it", work)
    while not lock.is_locked:
        await anyio.sleep(0.25)
        with contextlib.suppress(Timeout):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """The limit of open files (None: the system reports none), and how many are open."""

    limit: int | None
    used: int

    @property
    def requests(self) -> int | None:
        """Sampling requests that may be in flight at once; None for unlimited."""
        if self.limit is None:
            return None
        left = self.limit - self.used - min(RESERVE, self.limit // 4)
        return max(1, left - min(POSTING, left // 2))

    def warning(self, wanted: int) -> str | None:
        """A warning for a run that wants this many concurrent requests; None if the limit allows them."""
        most = self.requests
        if most is None or most >= wanted:
            return None
        return (
            f"this process may open {self.limit:,} files, which allows {most:,} concurrent sampling requests instead of "
            f"{wanted:,}: raise the hard limit (ulimit -Hn, or nofile in limits.conf)"
        )


def raise_limit() -> OpenFiles:
    """Raises the limit of open files as far as allowed, and returns it. Cheap; call it whenever work starts."""
    try:
        import resource
    except ImportError:  # Windows
        return OpenFiles(None, 0)
    kind = resource.RLIMIT_NOFILE
    soft, hard = resource.getrlimit(kind)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    # macOS reports "unlimited", but accepts at most 10,240 (OPEN_MAX) if the kernel's limit is lower.
    for value in (wanted, min(wanted, 10_240)):
        if soft != resource.RLIM_INFINITY and soft < value:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(kind, (value, hard))
        soft = resource.getrlimit(kind)[0]
    try:
        used = sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:  # a container without it, or no file left
        used = 64
    return OpenFiles(None if soft == resource.RLIM_INFINITY else soft, used)
