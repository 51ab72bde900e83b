"""Paths of users, made absolute once, with ``~`` expanded; files shared by processes; and the limit of open files.

Files are replaced atomically and folders locked. Failed writes raise :class:`OSError`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import anyio
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from searchr1_async.boundary.settings import as_text, shown, shown_with_kind
from searchr1_async.errors import ConfigurationError

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)

_LONGEST_NAME = 255
"""Maximum bytes of a file name, on all common file systems."""
WANTED = 65536
"""More than any run needs."""
RESERVE = 96
"""Files for everything but sampling: training calls, search, records, the view, late imports."""
POSTING = 400
"""Requests that the SDK posts concurrently; each needs a second connection for the post."""


def absolute_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Makes a user's path absolute, so that a later ``chdir`` has no effect.

    Links and ``..`` are kept, and no character is a wildcard.

    Args:
        path: relative to the current folder; ``~`` and ``~user`` are expanded.
        name: name of the argument, for messages.

    Raises:
        ConfigurationError: not a path, blank, or its home or current folder is unknown.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError(f"{name} is {shown_with_kind(path)}: expected a path, as text or Path")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise ConfigurationError(f"{name} is {text!r} (bytes): expected a path, as text or Path")
    if not text.strip() or "\0" in text:
        raise ConfigurationError(f"{name} is {text!r}: expected the path of a file or folder")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{name} is {text!r}, which has a lone surrogate at {error.start}: no file has such a name"
        ) from None
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(text).parts):
        raise ConfigurationError(
            f"{name} is {shown(text)}, with a name longer than {_LONGEST_NAME} bytes: no file has such a name"
        )
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no such user, no HOME; a current folder that was deleted
        raise ConfigurationError(
            f"{name} is {text!r}, which cannot be made absolute ({error}): use a full path"
        ) from error


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
        value = as_text(name, value)
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
    """The package's cache folder; created if missing.

    ``searchr1_async`` in ``$XDG_CACHE_HOME`` if set, else in the platform's cache folder. Without a writable home folder, it is a
    per-user temporary folder, with a warning.

    Raises:
        ConfigurationError: the folder cannot be created.
    """
    if explicit := os.environ.get("XDG_CACHE_HOME"):
        folder = absolute_path(explicit, "XDG_CACHE_HOME") / "searchr1_async"
        if problem := _problem_of(folder):
            raise ConfigurationError(
                f"XDG_CACHE_HOME is {explicit!r}, where no folder can be created ({problem}): set it to a writable folder"
            )
        return folder
    try:
        folder = _platform_cache() / "searchr1_async"
    except RuntimeError:
        return _temporary_cache("the user's home folder is not known")
    problem = _problem_of(folder)
    return folder if problem is None else _temporary_cache(f"{folder} cannot be created ({problem})")


def _platform_cache() -> Path:
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return home.absolute() / ".cache"


def _problem_of(folder: Path) -> str | None:
    """Why a folder cannot be created; None if it exists. A read-only one is still useful."""
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return None


@cache
def _temporary_cache(reason: str) -> Path:
    owner = os.getuid() if hasattr(os, "getuid") else "cache"
    advice = "set XDG_CACHE_HOME to a persistent, writable folder"
    try:
        folder = Path(tempfile.gettempdir()).absolute() / f"searchr1_async-{owner}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigurationError(f"there is no cache folder: {reason}, and {error}: {advice}") from error
    if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != owner):
        raise ConfigurationError(f"there is no cache folder: {reason}, and {folder} belongs to another user: {advice}")
    logger.warning("%s: using the temporary folder %s for indexes and models: %s", reason, folder, advice)
    return folder


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
