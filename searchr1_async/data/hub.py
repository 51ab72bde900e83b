"""Large files on the Hugging Face hub: look-up, resumable download, verification, and the unpacked size of an xz archive.

``hf_hub_download`` is unsuitable: since 1.x it deletes its temporary file when interrupted, so a download of hours starts over, and it
refuses files over 50 GB without Xet (huggingface_hub 2.4).
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import aiohttp
import anyio
import anyio.from_thread
import anyio.to_thread

from searchr1_async.boundary.network import long_wait_text, seconds_asked
from searchr1_async.boundary.paths import write_all
from searchr1_async.boundary.waits import Notify, in_thread, pause
from searchr1_async.errors import StoreError

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Receives the bytes done so far; called from the event loop."""
Read = Callable[[int, int], bytes]
"""``read(start, length)`` returns that part of the file."""

PART = 4 << 30
"""Bytes per request: the hub refuses responses over 50 GB, and its download URLs expire."""
BLOCK = 4 << 20
"""Bytes per write; about this much is fetched again after a kill."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 120.0)
"""Seconds between retries; reset whenever bytes arrive."""
LONGEST_WAIT = 600.0
"""Default maximum ``Retry-After``, in seconds."""
_FOOTER_MAGIC, _HEADER_SIZE, _FOOTER_SIZE = b"YZ", 12, 12
_MOST_INDEX_BYTES = 64 << 20
"""xz writes about 8 bytes per block, and by default a block per 24 MiB."""
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
_GONE = {
    401: "it requires a token: set HF_TOKEN",
    403: "the token has no access: accept the data set's terms on the hub, or set another HF_TOKEN",
    404: "it does not exist",
}


@dataclass(frozen=True, slots=True)
class HubFile:
    """A large file of a data set on the hub."""

    repository: str
    filename: str
    revision: str
    """The commit of the requested revision."""
    url: str
    size: int
    sha256: str
    headers: dict[str, str] = field(repr=False)
    """Includes the user's token, if any; never shown."""

    @property
    def name(self) -> str:
        return f"{self.filename} of {self.repository} on the Hugging Face hub"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for the hub, and where to report waits."""

    longest_wait: float = LONGEST_WAIT
    """Maximum ``Retry-After`` in seconds; the download fails at once if the hub asks for more."""
    notify: Notify = logger.warning
    """Receives each wait over 5 seconds, with its reason and end."""


async def look_up(repository: str, filename: str, revision: str | None = None, endpoint: str | None = None) -> HubFile:
    """Queries the hub for a file's size and checksum.

    Args:
        repository: ``org/name`` of a data set.
        filename: path in the data set.
        revision: a branch, tag or commit; None means ``main``.
        endpoint: the hub's address; None means ``$HF_ENDPOINT``, or the public hub.

    Raises:
        StoreError: the file does not exist, is not a large file, or the hub cannot be reached.
    """
    return await anyio.to_thread.run_sync(_look_up, repository, filename, revision, endpoint)


def _look_up(repository: str, filename: str, revision: str | None, endpoint: str | None) -> HubFile:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers

    name = f"{filename} of the data set {repository}"
    try:
        url = hf_hub_url(repository, filename, repo_type="dataset", revision=revision, endpoint=endpoint)
        found = get_hf_file_metadata(url, timeout=30, endpoint=endpoint)
        if found.commit_hash:  # pinned, so that a push to the hub cannot change the file during the download
            url = hf_hub_url(repository, filename, repo_type="dataset", revision=found.commit_hash, endpoint=endpoint)
    except OfflineModeIsEnabled as error:
        raise StoreError(
            f"{name} is not downloaded, and HF_HUB_OFFLINE forbids downloading it: unset that variable"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = "it does not exist" if isinstance(error, EntryNotFoundError) else _GONE.get(status, f"HTTP {status}")
        raise StoreError(f"{name} is not available from the Hugging Face hub: {reason}") from error
    except Exception as error:  # httpx's errors up to huggingface_hub 1.x, httpx2's since then
        raise StoreError(
            f"the Hugging Face hub cannot be reached for {name} ({type(error).__name__}): check the network and "
            "HF_ENDPOINT, and try again"
        ) from error
    if found.size is None or not re.fullmatch(r"[0-9a-f]{64}", found.etag or ""):
        raise StoreError(f"{name} has no size or checksum on the hub: it is not stored as a large file there")
    assert found.etag is not None
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    revision = found.commit_hash or revision or "main"
    return HubFile(repository, filename, revision, url, found.size, found.etag, headers)


async def fetch_part(file: HubFile, start: int, length: int, patience: Patience | None = None) -> bytes:
    """Fetches a small part of the file; ``patience`` None uses the default.

    Raises:
        StoreError: the hub does not respond, or not with that part.
    """
    content = bytearray()
    async with _session(file) as session:

        async def fetch() -> bool:
            content.clear()
            async with _part(session, file, start, start + length) as response:
                content.extend(await response.read())
            if len(content) != length:
                raise aiohttp.ClientPayloadError(f"{len(content)} of {length} bytes")
            return True

        pauses = PAUSES[:3]
        await retried(fetch, lambda: len(content), pauses, _Waits(file, len(pauses), patience or Patience()).wait)
    return bytes(content)


async def download(file: HubFile, target: Path, advance: Advance, patience: Patience | None = None) -> None:
    """Appends what ``target`` lacks of the file. Existing bytes are trusted until :func:`verify`.

    Args:
        file: file to fetch.
        target: created if missing.
        advance: called with the bytes present.
        patience: None uses the default.

    Raises:
        StoreError: the hub rejects the request, is down for longer than all retries, or asks for too long a wait.
        OSError: the file cannot be written.
    """
    async with _session(file) as session:
        with target.open("ab", buffering=0) as output:
            if output.tell() > file.size:
                output.truncate(0)
            advance(output.tell())

            async def one_part() -> bool:
                start = output.tell()
                if start < file.size:
                    end = min(start + PART, file.size)
                    async with _part(session, file, start, end) as response:
                        await append_body(response, output, advance)
                    if output.tell() < end:
                        raise aiohttp.ClientPayloadError(f"the response ended {end - output.tell()} bytes early")
                return output.tell() >= file.size

            await retried(one_part, output.tell, PAUSES, _Waits(file, len(PAUSES), patience or Patience()).wait)


@dataclass(frozen=True, slots=True)
class _Waits:
    """The waits between the attempts of one file."""

    file: HubFile
    attempts: int
    patience: Patience

    async def wait(self, error: Exception, seconds: float | None) -> None:
        """Waits as long as the hub asks for, at least ``seconds``.

        Raises:
            StoreError: it asks for more than allowed, or no attempt is left.
        """
        name, longest = self.file.name, self.patience.longest_wait
        failed = f"the download of {name} failed"
        if seconds is None:
            raise StoreError(
                f"{failed} {self.attempts} times in a row ({fault_of(error)}): check the network and run the same command "
                "again; the partial download is kept"
            ) from error
        asked = _asked(error)
        if asked > longest:
            raise StoreError(long_wait_text(name, asked, longest, "longest_wait")) from error
        logger.info("%s (%s): retrying", failed, fault_of(error))
        await pause(max(asked, seconds), f"{failed} ({fault_of(error)})", self.patience.notify)


def _asked(error: Exception) -> float:
    """``Retry-After`` of a response in seconds; 0 without."""
    if not isinstance(error, aiohttp.ClientResponseError) or error.headers is None:
        return 0.0
    return seconds_asked(error.headers.get("Retry-After", ""), datetime.now(UTC)) or 0.0


def _session(file: HubFile) -> aiohttp.ClientSession:
    # aiohttp drops the token when the hub redirects to another host.
    return download_session(file.headers)


@asynccontextmanager
async def _part(
    session: aiohttp.ClientSession, file: HubFile, start: int, end: int
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The response for bytes ``start`` up to (not including) ``end``."""
    async with session.get(file.url, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
        if response.status in _GONE:
            raise StoreError(f"{file.name} is not available: {_GONE[response.status]}")
        response.raise_for_status()
        whole = start == 0 and end == file.size and response.status == 200
        if not whole and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise StoreError(
                f"the server ignored the Range header for {file.name} (a proxy?): download the file another way"
            )
        yield response


def verify(file: HubFile, path: Path, advance: Advance) -> None:
    """Hashes the file, and deletes it if its checksum differs from the hub's. Blocking.

    Raises:
        StoreError: the checksum differs.
    """
    digest, done = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as content:
        while block := content.read(BLOCK):
            digest.update(block)
            done += len(block)
            report(advance, done)
    if digest.hexdigest() != file.sha256:
        path.unlink()
        raise StoreError(
            f"{file.name} was damaged in transit: its SHA-256 is {digest.hexdigest()[:12]}…, the hub's {file.sha256[:12]}…; "
            "it was deleted: run the same command again"
        )


def report(advance: Advance, done: int) -> None:
    """Reports progress from a thread of :func:`~searchr1_async.boundary.waits.in_thread`; raises if its caller was cancelled."""
    anyio.from_thread.check_cancelled()
    anyio.from_thread.run_sync(advance, done)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def download_session(headers: Mapping[str, str] | None = None) -> aiohttp.ClientSession:
    """A client for large files: no limit in total, 60 s without a byte."""
    return aiohttp.ClientSession(timeout=_TIMEOUT, headers=headers, trust_env=True, auto_decompress=False)


async def retried(
    step: Callable[[], Awaitable[bool]],
    position: Callable[[], int],
    pauses: Sequence[float],
    wait: Callable[[Exception, float | None], Awaitable[None]],
) -> None:
    """Repeats ``step`` until it returns True, with growing pauses while it makes no progress.

    Args:
        position: bytes done so far.
        wait: receives each network error and the pause before the next attempt, in seconds; None: ``pauses`` are used up,
            so it must raise.
    """
    failures, before = 0, position()
    while True:
        try:
            if await step():
                return
        except (aiohttp.ClientError, TimeoutError) as error:
            failures = 0 if position() > before else failures
            await wait(error, pauses[failures] if failures < len(pauses) else None)
            failures += 1
        before = position()


async def append_body(response: aiohttp.ClientResponse, output: BinaryIO, advance: Advance = lambda done: None) -> None:
    """Appends a response's body to an unbuffered file. What arrived before an error is kept."""
    block = bytearray()

    async def write() -> None:
        await in_thread(lambda: write_all(output, block))
        block.clear()
        advance(output.tell())

    try:
        async for chunk in response.content.iter_any():
            block += chunk
            if len(block) >= BLOCK:
                await write()
    except (aiohttp.ClientError, TimeoutError):
        await write()
        raise
    await write()


def fault_of(error: Exception) -> str:
    """A network error in short, for messages."""
    return f"HTTP {error.status}" if isinstance(error, aiohttp.ClientResponseError) else type(error).__name__


class BrokenXzError(ValueError):
    """Not an xz file, or truncated."""


def unpacked_size(read: Read, size: int) -> int:
    """The unpacked size of an xz file, over all its streams.

    Every stream ends with an index of its blocks and a footer with the index's length: section 2.1.2 and chapter 4 of "The .xz File
    Format", version 1.2.1. Only these are read, backwards.

    Args:
        read: reads a part of the file.
        size: size of the file in bytes.

    Raises:
        BrokenXzError: not an xz file, or truncated.
        Exception: any error of ``read``.
    """
    total, end = 0, size
    while end:
        if end < _HEADER_SIZE + _FOOTER_SIZE:
            raise BrokenXzError("too short for an xz stream")
        footer = read(end - _FOOTER_SIZE, _FOOTER_SIZE)
        if footer == bytes(_FOOTER_SIZE) or footer[-4:] == bytes(4):  # padding between streams, in steps of 4 bytes
            end -= 4
            continue
        blocks, unpacked, index_size = _read_stream_end(read, end, footer)
        end -= _HEADER_SIZE + blocks + index_size + _FOOTER_SIZE
        if end < 0:
            raise BrokenXzError("an xz stream is longer than its file")
        total += unpacked
    return total


def _read_stream_end(read: Read, end: int, footer: bytes) -> tuple[int, int, int]:
    """Of the stream that ends at ``end``: size of its blocks, their unpacked size, and size of its index."""
    if len(footer) != _FOOTER_SIZE or footer[10:] != _FOOTER_MAGIC or zlib.crc32(footer[4:10]) != _number(footer[:4]):
        raise BrokenXzError("no xz footer at the end")
    index_size = (_number(footer[4:8]) + 1) * 4
    start = end - _FOOTER_SIZE - index_size
    if start < _HEADER_SIZE or index_size > _MOST_INDEX_BYTES:
        raise BrokenXzError("an invalid xz index")
    index = read(start, index_size)
    if len(index) != index_size or index[0] != 0 or zlib.crc32(index[:-4]) != _number(index[-4:]):
        raise BrokenXzError("a corrupt xz index")
    count, position = _variable_length(index, 1)
    blocks = unpacked = 0
    for _ in range(count):
        block, position = _variable_length(index, position)
        content, position = _variable_length(index, position)
        blocks += (block + 3) // 4 * 4
        unpacked += content
    return blocks, unpacked, index_size


def _number(little_endian: bytes) -> int:
    return int.from_bytes(little_endian, "little")


def _variable_length(data: bytes, position: int) -> tuple[int, int]:
    """The number at ``position`` and the position after it: 7 bits per byte, the high bit marks continuation."""
    value = shift = 0
    while shift < 63 and position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise BrokenXzError("a corrupt number in an xz index")
