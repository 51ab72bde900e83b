"""The prebuilt index of Wikipedia 2018 that Search-R1 uses: download, verification and unpacking.

21,015,324 passages of 100 words, embedded by ``gemini-embedding-001`` at 768 dimensions: a Chroma folder in one archive on the
Hugging Face hub. This takes hours and hundreds of gigabytes, so the download resumes, every other step restarts by itself, and the
folder appears only when complete.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path, cache_folder, free_bytes, only_one, write_atomically
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.hub import Advance, HubFile, download, look_up, report, verify
from searchr1_async.errors import StoreError
from searchr1_async.events import Emit, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted, emit_nothing

REPOSITORY = "tianyi-thinks/2018-wiki-index"
ARCHIVE = "chroma_db.tar.xz"
PASSAGES, DIMENSION = 21_015_324, 768


async def fetch_index(
    folder: str | Path | None = None, *, keep_archive: bool = False, spare: int = 0, emit: Emit = emit_nothing
) -> Path:
    """Fetches the prebuilt Chroma folder, ready for ``chroma run --path``, unless it is already there; returns its path.

    Args:
        folder: folder for the archive and the index; None uses the user's cache.
        keep_archive: keep the archive beside the index.
        spare: bytes that must be free beside archive and index.
        emit: receives the phases ``download``, ``verify`` and ``unpack``, in megabytes, and each wait over 5 seconds.

    Raises:
        ConfigurationError: an invalid folder.
        StoreError: the archive is unavailable, too large for the disk or damaged, or the folder is not writable. The partial
            download is kept.
    """
    place = index_place(folder)
    try:
        if not await in_thread(lambda: _is_whole(place)):
            await anyio.to_thread.run_sync(lambda: place.mkdir(parents=True, exist_ok=True))
            async with only_one(place / "fetch", f"fetching {ARCHIVE} into {place}"):
                if not await in_thread(lambda: _is_whole(place)):
                    await _fetch(place, keep_archive, spare, emit)
    except OSError as error:
        raise StoreError(
            f"{place} cannot be written: {error.strerror or error} ({free_bytes(place):,} bytes are free); the partial download is "
            "kept: free space or fix the cause, and run the same command again"
        ) from error
    return place / "chroma"


def delete_index(folder: str | Path | None = None) -> None:
    """Deletes the index and its archive. Blocking. An interruption never leaves a partial index that looks complete.

    Raises:
        OSError: they cannot be deleted.
    """
    place = index_place(folder)
    if (index := place / "chroma").is_dir():
        shutil.rmtree(place / "unpacking", ignore_errors=True)
        index.replace(place / "unpacking")
    if (place / "unpacking").is_dir():
        shutil.rmtree(place / "unpacking")
    for archive in place.glob(f"{ARCHIVE}.*"):
        archive.unlink()


def index_place(folder: str | Path | None) -> Path:
    """The folder of archive and index; for None in the user's cache."""
    return cache_folder() / "wiki18" if folder is None else absolute_path(folder, "folder")


def _is_whole(place: Path) -> bool:
    """Whether the index was fetched before: it gets its name when complete. Raises StoreError if it is another index."""
    if not (place / "chroma").is_dir():
        return False
    try:
        source = json.loads((place / "source.json").read_bytes())
        is_ours = (source["repository"], source["filename"]) == (REPOSITORY, ARCHIVE)
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise StoreError(f"{place / 'chroma'} does not hold {ARCHIVE} of {REPOSITORY}: choose another folder")
    return True


async def _fetch(place: Path, keep_archive: bool, spare: int, emit: Emit) -> None:
    file = await anyio.to_thread.run_sync(look_up, REPOSITORY, ARCHIVE)
    archive = place / f"{ARCHIVE}.{file.sha256[:16]}"
    partial = archive.with_name(f"{archive.name}.partial")
    await in_thread(lambda: shutil.rmtree(place / "unpacking", ignore_errors=True))
    _check_room(
        place, file, next((path.stat().st_size for path in (archive, partial) if path.exists()), 0), spare, emit
    )
    if not archive.exists():
        with _phase(emit, "download", file.size) as advance:
            await download(file, partial, advance, lambda text: emit(Notice(text, is_warning=True)))
        with _phase(emit, "verify", file.size) as advance:
            await in_thread(lambda: verify(file, partial, advance))
        partial.replace(archive)
    with _phase(emit, "unpack", file.size) as advance:
        await in_thread(lambda: _unpack(archive, place, advance))
    if not keep_archive:
        archive.unlink(missing_ok=True)


def _check_room(place: Path, file: HubFile, there: int, spare: int, emit: Emit) -> None:
    """Raises StoreError if what is surely needed does not fit: the unpacked index is larger than its archive."""
    needed, free = max(0, file.size - there) + file.size + spare, free_bytes(place)
    words = (
        f"{gigabytes(file.size - there)} to fetch, and the index unpacked of it, need over {gigabytes(needed)} in {place}, where "
        f"{gigabytes(free)} are free"
    )
    if needed > free:
        raise StoreError(f"{words}: free {gigabytes(needed - free)} or more, or choose a folder on another disk")
    emit(Notice(words))


def _unpack(archive: Path, place: Path, advance: Advance) -> None:
    """Unpacks the Chroma folder, which may be nested, and gives it its name once it is on disk. Blocking.

    tarfile's filter ``data`` rejects members outside the folder.
    """
    unpacking = place / "unpacking"
    try:
        with _Counted(archive, advance) as file, tarfile.open(fileobj=file, mode="r|xz", bufsize=1 << 20) as members:
            members.extractall(unpacking, filter="data")
        databases = sorted(unpacking.rglob("chroma.sqlite3"), key=lambda path: len(path.parts))
        if not databases:
            raise StoreError(f"{archive} contains no Chroma folder (no chroma.sqlite3)")
        if hasattr(os, "sync"):
            os.sync()
        source = {"repository": REPOSITORY, "filename": ARCHIVE}
        write_atomically(place / "source.json", json.dumps(source, indent=1).encode())
        databases[0].parent.replace(place / "chroma")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise StoreError(f"{archive} cannot be unpacked ({type(error).__name__}: {error})") from error
    finally:  # also when cancelled: a partial index only takes space
        shutil.rmtree(unpacking, ignore_errors=True)


class _Counted(io.FileIO):
    """A file that reports how far it was read, from the reading thread."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path)
        self._advance = advance

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        report(self._advance, self.tell())
        return content or b""


@contextmanager
def _phase(emit: Emit, name: str, size: int) -> Iterator[Advance]:
    began = time.monotonic()
    emit(PhaseStarted(name, -(-size // 1_000_000), "MB"))
    yield lambda done: emit(PhaseAdvanced(name, -(-done // 1_000_000)))
    emit(PhaseEnded(name, time.monotonic() - began))


def gigabytes(size: int) -> str:
    """A size for messages."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
