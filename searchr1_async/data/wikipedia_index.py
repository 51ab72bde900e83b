"""The prebuilt index of Wikipedia 2018 that Search-R1 uses: download, verification and unpacking.

21,015,324 passages of 100 words, embedded by ``gemini-embedding-001`` at 768 dimensions: a Chroma folder in one archive on the
Hugging Face hub. This takes hours and hundreds of gigabytes, so every step resumes or restarts by itself, and the folder appears only
when complete.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import lzma
import os
import shutil
import sqlite3
import tarfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path, cache_folder, only_one, write_atomically
from searchr1_async.boundary.settings import as_number
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.hub import (
    BLOCK,
    LONGEST_WAIT,
    Advance,
    BrokenXzError,
    HubFile,
    Patience,
    download,
    fetch_part,
    free_bytes,
    look_up,
    report,
    unpacked_size,
    verify,
)
from searchr1_async.errors import StoreError
from searchr1_async.events import Emit, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted, emit_nothing

logger = logging.getLogger(__name__)

REPOSITORY = "tianyi-thinks/2018-wiki-index"
ARCHIVE = "chroma_db.tar.xz"

_SPARE = 256 << 20
"""Bytes to keep free."""
_REPORTED = 16 << 20
"""Bytes between two progress reports of unpacking."""


@dataclass(frozen=True, slots=True)
class Collection:
    """A collection in a Chroma folder."""

    name: str
    passages: int
    dimension: int | None

    @property
    def memory(self) -> int:
        """Approximate memory of a Chroma server for it, in bytes: float32 vectors, plus a measured 630 bytes per vector."""
        return self.passages * (4 * (self.dimension or 0) + 630)


@dataclass(frozen=True, slots=True)
class PrebuiltIndex:
    """A local Chroma folder, ready for ``chroma run --path``."""

    path: Path
    repository: str
    filename: str
    revision: str
    collections: tuple[Collection, ...]
    """Empty if the folder's layout is not supported."""
    is_new: bool
    """False if it had been fetched before."""

    @property
    def memory(self) -> int:
        """Approximate memory to serve all collections, in bytes; 0 if unknown."""
        return sum(collection.memory for collection in self.collections)


async def fetch_index(
    folder: str | Path | None = None,
    *,
    repository: str = REPOSITORY,
    filename: str = ARCHIVE,
    revision: str | None = None,
    keep_archive: bool = False,
    endpoint: str | None = None,
    longest_wait: float = LONGEST_WAIT,
    emit: Emit = emit_nothing,
) -> PrebuiltIndex:
    """Fetches a prebuilt Chroma folder from the Hugging Face hub, unless it is already there.

    Args:
        folder: folder for the archive and the index; None uses the user's cache.
        repository: the data set, ``org/name``.
        filename: the archive, a ``.tar.xz`` of a Chroma folder.
        revision: a branch, tag or commit; None means ``main``, or any revision fetched before.
        keep_archive: keep the archive beside the index.
        endpoint: the hub's address; None means ``$HF_ENDPOINT``, or the public hub.
        longest_wait: maximum ``Retry-After`` of the hub to obey, in seconds; fails if it asks for more.
        emit: receives the phases ``download``, ``verify`` and ``unpack``, in megabytes, and each wait over 5 seconds.

    Raises:
        ConfigurationError: an invalid folder or wait.
        StoreError: the archive is unavailable, too large for the disk or damaged, or the folder is not writable. The partial
            download is kept.
    """
    place = _place(folder)
    longest_wait = as_number("longest_wait", longest_wait, over=0)
    fetch = _Fetch(place, repository, filename, revision, keep_archive, endpoint, emit, longest_wait)
    try:
        if (found := await in_thread(fetch.whole)) is not None:
            return found
        await anyio.to_thread.run_sync(lambda: place.mkdir(parents=True, exist_ok=True))
        async with only_one(place / "fetch", f"fetching {filename} into {place}"):
            return await in_thread(fetch.whole) or await fetch.run()
    except OSError as error:
        raise StoreError(
            f"{place} cannot be written: {error.strerror or error} ({free_bytes(place):,} bytes are free); the partial download is "
            "kept: free space or fix the cause, and run the same command again"
        ) from error


@dataclass(frozen=True, slots=True)
class FetchSizes:
    """Remaining work of :func:`fetch_index`, in bytes; all 0 if the index is there."""

    there: int
    """Bytes of the archive already downloaded."""
    to_fetch: int
    unpacked: int


async def fetch_sizes(
    folder: str | Path | None = None,
    *,
    repository: str = REPOSITORY,
    filename: str = ARCHIVE,
    revision: str | None = None,
    endpoint: str | None = None,
) -> FetchSizes:
    """What :func:`fetch_index` would fetch and unpack. Queries the hub; writes nothing.

    Raises:
        StoreError: the file does not exist on the hub, or the folder holds another index.
    """
    fetch = _Fetch(_place(folder), repository, filename, revision, False, endpoint, emit_nothing)
    if await in_thread(fetch.whole) is not None:
        return FetchSizes(0, 0, 0)
    file = await look_up(repository, filename, revision, endpoint)
    return await fetch.sizes(file)


def delete_index(folder: str | Path | None = None, filename: str = ARCHIVE, *, keep_archive: bool = False) -> None:
    """Deletes the index and its archive. Blocking. An interruption never leaves a partial index that looks complete.

    Raises:
        OSError: they cannot be deleted.
    """
    place = _place(folder)
    fetch = _Fetch(place, "", filename, None, False, None, emit_nothing)
    if fetch.index.is_dir():
        shutil.rmtree(fetch.unpacking, ignore_errors=True)
        fetch.index.replace(fetch.unpacking)
    if fetch.unpacking.is_dir():
        shutil.rmtree(fetch.unpacking)
    begin = f"{Path(filename).name}."
    for archive in () if keep_archive or not place.is_dir() else list(place.iterdir()):
        if archive.name.startswith(begin):
            archive.unlink()


def _place(folder: str | Path | None) -> Path:
    return cache_folder() / "wiki18" if folder is None else absolute_path(folder, "folder")


@dataclass(frozen=True, slots=True)
class _Fetch:
    folder: Path
    repository: str
    filename: str
    revision: str | None
    keep_archive: bool
    endpoint: str | None
    emit: Emit
    longest_wait: float = LONGEST_WAIT

    @property
    def patience(self) -> Patience:
        return Patience(self.longest_wait, lambda text: self.emit(Notice(text, is_warning=True)))

    @property
    def index(self) -> Path:
        return self.folder / "chroma"

    @property
    def record(self) -> Path:
        return self.folder / "source.json"

    @property
    def unpacking(self) -> Path:
        return self.folder / "unpacking"

    def whole(self) -> PrebuiltIndex | None:
        """The index, if fetched before. Blocking. It gets its final name only when complete.

        Raises:
            StoreError: the folder holds another index.
        """
        if not self.index.is_dir():
            return None
        try:
            source = json.loads(self.record.read_text(encoding="utf-8"))
            same = (source["repository"], source["filename"]) == (self.repository, self.filename)
            if same and self.revision in (None, source["revision"], source["commit"]):
                return self._found(str(source["commit"]), collections_in(self.index), is_new=False)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise StoreError(f"{self.index} does not hold {self.filename} of {self.repository}: choose another folder")

    async def run(self) -> PrebuiltIndex:
        file = await look_up(self.repository, self.filename, self.revision, self.endpoint)
        archive, partial = self._archive(file)
        await in_thread(lambda: shutil.rmtree(self.unpacking, ignore_errors=True))
        unpacked = await self._check_room(file)
        if not archive.exists():
            async with self._phase("download", file.size) as advance:
                await download(file, partial, advance, self.patience)
            async with self._phase("verify", file.size) as advance:
                await in_thread(lambda: verify(file, partial, advance))
            partial.replace(archive)
        async with self._phase("unpack", file.size) as advance:
            await in_thread(lambda: self._unpack(archive, unpacked, advance))
        source = {
            "repository": self.repository,
            "filename": self.filename,
            "revision": self.revision or "main",
            "commit": file.revision,
            "sha256": file.sha256,
        }
        collections = await in_thread(lambda: self._put_in_place(json.dumps(source, indent=1).encode()))
        if not self.keep_archive:
            archive.unlink(missing_ok=True)
        return self._found(file.revision, collections, is_new=True)

    def _found(self, commit: str, collections: tuple[Collection, ...], *, is_new: bool) -> PrebuiltIndex:
        return PrebuiltIndex(self.index, self.repository, self.filename, commit, collections, is_new)

    def _archive(self, file: HubFile) -> tuple[Path, Path]:
        """Paths of the complete archive and the partial download."""
        archive = self.folder / f"{Path(self.filename).name}.{file.sha256[:16]}"
        return archive, archive.with_name(f"{archive.name}.partial")

    async def sizes(self, file: HubFile) -> FetchSizes:
        """Remaining sizes; the unpacked size is read from the archive's end."""
        have = next((path.stat().st_size for path in self._archive(file) if path.exists()), 0)
        return FetchSizes(have, max(0, file.size - have), await self._unpacked_size(file))

    async def _check_room(self, file: HubFile) -> int:
        """Raises StoreError unless archive and index fit on the disk; returns the unpacked size."""
        sizes = await self.sizes(file)
        to_fetch, unpacked = sizes.to_fetch, sizes.unpacked
        needed, free = to_fetch + unpacked + _SPARE, free_bytes(self.folder)
        words = (
            f"{gigabytes(to_fetch)} to fetch and {gigabytes(unpacked)} unpacked need {gigabytes(needed)} in "
            f"{self.folder}, where {gigabytes(free)} are free"
        )
        if needed > free:
            raise StoreError(f"{words}: free {gigabytes(needed - free)}, or choose a folder on another disk")
        self.emit(Notice(f"{self.filename} of {self.repository}: {words}"))
        return unpacked

    async def _unpacked_size(self, file: HubFile) -> int:
        def read(start: int, length: int) -> bytes:
            return anyio.from_thread.run(fetch_part, file, start, length, self.patience)

        try:
            return await in_thread(lambda: unpacked_size(read, file.size))
        except BrokenXzError as error:
            raise StoreError(f"{file.name} is not a .tar.xz archive ({error}): name another file") from error

    def _unpack(self, archive: Path, unpacked: int, advance: Advance) -> None:
        """Blocking. tarfile's filter ``data`` rejects members outside the folder."""
        written = 0
        try:
            with (
                archive.open("rb", buffering=0) as file,
                lzma.open(io.BufferedReader(_Counted(file, advance), BLOCK)) as content,
                tarfile.open(fileobj=content, mode="r|", bufsize=1 << 20) as members,
            ):
                for member in members:
                    written += member.size
                    if written > unpacked:
                        raise StoreError(f"{archive} contains more than it declares: not unpacked")
                    members.extract(member, self.unpacking, filter="data")
        except BaseException as error:  # also when cancelled: a partial index only takes space
            shutil.rmtree(self.unpacking, ignore_errors=True)
            if isinstance(error, tarfile.TarError | lzma.LZMAError | EOFError):
                raise StoreError(f"{archive} cannot be unpacked ({type(error).__name__}: {error})") from error
            raise

    def _put_in_place(self, source: bytes) -> tuple[Collection, ...]:
        """Moves the Chroma folder, which may be nested, to its final name once it is on disk. Blocking."""
        databases = sorted(self.unpacking.rglob("chroma.sqlite3"), key=lambda path: len(path.parts))
        if not databases:
            raise StoreError(f"{self.filename} of {self.repository} contains no Chroma folder (no chroma.sqlite3)")
        found = collections_in(databases[0].parent)
        if hasattr(os, "sync"):
            os.sync()
        write_atomically(self.record, source)
        databases[0].parent.replace(self.index)
        shutil.rmtree(self.unpacking, ignore_errors=True)
        return found

    @asynccontextmanager
    async def _phase(self, name: str, size: int) -> AsyncIterator[Advance]:
        began = time.monotonic()
        self.emit(PhaseStarted(name, _megabytes(size), "MB"))
        yield lambda done: self.emit(PhaseAdvanced(name, _megabytes(done)))
        self.emit(PhaseEnded(name, time.monotonic() - began))


class _Counted(io.RawIOBase):
    """A file that reports regularly how far it was read, from the reading thread."""

    def __init__(self, file: io.RawIOBase | io.FileIO, advance: Advance) -> None:
        super().__init__()
        self._file, self._advance = file, advance
        self._done = self._reported = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        size = self._file.readinto(buffer)
        self._done += size or 0
        if not size or self._done - self._reported >= _REPORTED:
            self._reported = self._done
            report(self._advance, self._done)
        return size


def collections_in(folder: Path) -> tuple[Collection, ...]:
    """The collections of a Chroma folder, read from its database; empty if the layout is not supported."""
    with contextlib.suppress(sqlite3.Error):
        database = sqlite3.connect(f"{(folder / 'chroma.sqlite3').as_uri()}?mode=ro", uri=True)
        with contextlib.closing(database):
            rows = database.execute(
                "SELECT c.name, count(e.id), c.dimension FROM collections c JOIN segments s ON s.collection = c.id "
                "JOIN embeddings e ON e.segment_id = s.id GROUP BY c.id ORDER BY c.name"
            )
            return tuple(Collection(str(name), int(count), dimension) for name, count, dimension in rows)
    return ()


def _megabytes(size: int) -> int:
    return -(-size // 1_000_000)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
