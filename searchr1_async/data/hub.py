"""Resumable, verified download of one very large file from the Hugging Face hub.

``hf_hub_download`` is unsuitable: since 1.x it deletes its temporary file when interrupted, so a download of hours starts over, and it
refuses files over 50 GB without Xet (huggingface_hub 2.4).

Downloads question files from the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import aiohttp
import anyio
import anyio.from_thread
import anyio.to_thread

from searchr1_async.boundary.network import refused_wait, seconds_asked
from searchr1_async.boundary.paths import write_all
from searchr1_async.boundary.waits import Tell, in_thread, pause
from searchr1_async.errors import QuestionsError, StoreError

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Receives the bytes done so far; called from the event loop."""

PART = 4 << 30
"""Bytes per request: the hub refuses responses over 50 GB, and its download URLs expire."""
BLOCK = 4 << 20
"""Bytes per write; about this much is fetched again after a kill."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 120.0)
"""Seconds between retries; reset whenever bytes arrive."""
LONGEST_WAIT = 600.0
"""Default maximum ``Retry-After``, in seconds."""
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
    tell: Tell = logger.warning
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
    async with _session(file) as session:
        content = bytearray()
        await _with_pauses(
            _Waits(file, PAUSES[:3], patience or Patience()),
            lambda: len(content),
            lambda: _ask(session, file, start, length, content),
        )
    return bytes(content)


async def _ask(session: aiohttp.ClientSession, file: HubFile, start: int, length: int, content: bytearray) -> bool:
    content.clear()
    async with _part(session, file, start, start + length) as response:
        content += await response.read()
    if len(content) != length:
        raise aiohttp.ClientPayloadError(f"{len(content)} of {length} bytes")
    return True


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
                    await _append_part(session, file, output, min(start + PART, file.size), advance)
                return output.tell() >= file.size

            await _with_pauses(_Waits(file, PAUSES, patience or Patience()), output.tell, one_part)


async def _append_part(
    session: aiohttp.ClientSession, file: HubFile, output: BinaryIO, end: int, advance: Advance
) -> None:
    block = bytearray()

    async def write() -> None:
        await in_thread(lambda: write_all(output, block))
        block.clear()
        advance(output.tell())

    async with _part(session, file, output.tell(), end) as response:
        try:
            async for chunk in response.content.iter_any():
                block += chunk
                if len(block) >= BLOCK:
                    await write()
        except (aiohttp.ClientError, TimeoutError):
            await write()  # keep what arrived before the error
            raise
        await write()
    if output.tell() < end:
        raise aiohttp.ClientPayloadError(f"the response ended {end - output.tell()} bytes early")


@dataclass(frozen=True, slots=True)
class _Waits:
    """The pauses between retries."""

    file: HubFile
    pauses: Sequence[float]
    patience: Patience

    def after(self, error: BaseException, failures: int) -> float:
        """Seconds to wait after this many consecutive failures; longer if the hub asks for it.

        Raises:
            StoreError: it asks for more than allowed.
        """
        asked = _asked(error)
        if asked > self.patience.longest_wait:
            raise StoreError(refused_wait(self.file.name, asked, self.patience.longest_wait, "longest_wait")) from error
        return max(asked, self.pauses[failures])


def _asked(error: BaseException) -> float:
    """``Retry-After`` of a response in seconds; 0 without."""
    if not isinstance(error, aiohttp.ClientResponseError) or error.headers is None:
        return 0.0
    return seconds_asked(error.headers.get("Retry-After", ""), datetime.now(UTC)) or 0.0


async def _with_pauses(waits: _Waits, position: Callable[[], int], step: Callable[[], Awaitable[bool]]) -> None:
    """Repeats ``step`` until it returns True, with growing pauses while it makes no progress."""
    file, pauses = waits.file, waits.pauses
    failures, before = 0, position()
    while True:
        try:
            if await step():
                return
        except (aiohttp.ClientError, TimeoutError) as error:
            failures = 0 if position() > before else failures
            if failures >= len(pauses):
                raise StoreError(
                    f"the download of {file.name} failed {len(pauses)} times in a row ({_reason(error)}): check the "
                    "network and run the same command again; the partial download is kept"
                ) from error
            logger.info("the download of %s failed (%s): retrying", file.name, _reason(error))
            await pause(
                waits.after(error, failures),
                f"the download of {file.name} failed ({_reason(error)})",
                waits.patience.tell,
            )
            failures += 1
        before = position()


def _reason(error: BaseException) -> str:
    return f"HTTP {error.status}" if isinstance(error, aiohttp.ClientResponseError) else type(error).__name__


@asynccontextmanager
async def _session(file: HubFile) -> AsyncIterator[aiohttp.ClientSession]:
    # aiohttp drops the token when the hub redirects to another host.
    async with aiohttp.ClientSession(
        timeout=_TIMEOUT, headers=file.headers, trust_env=True, auto_decompress=False
    ) as session:
        yield session


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


FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
SUITES = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
"""FlashRAG's standard suites, each with the split that is usually reported."""

HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(rf"(?P<name>{HUB_NAME}|{'|'.join(SUITES)})(?:@(?P<revision>[\w.-]+)(?:/(?P<filename>[^#]+))?)?")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A reference to a data set on the hub."""

    name: str
    """A key of :data:`SUITES`, or ``"org/name"``."""
    revision: str | None = None
    """A commit, branch or tag; None is the latest."""
    filename: str | None = None
    """A file; None is the split's file."""


@dataclass(frozen=True, slots=True)
class HubQuestions:
    """A downloaded question file."""

    path: Path
    repository: str
    commit: str
    """The commit of the requested revision."""
    filename: str

    @property
    def source(self) -> str:
        """A reference for :func:`read_reference` that is pinned to this commit."""
        return f"{self.repository}@{self.commit}/{self.filename}"


def read_reference(text: str) -> HubReference | None:
    """``"nq"`` or ``"org/name"``, optionally with ``@revision`` and then ``/file``; None for any other text."""
    found = _REFERENCE.fullmatch(text)
    if not found or ".." in (found["filename"] or "").split("/"):  # a manifest may be untrusted
        return None
    return HubReference(found["name"], found["revision"], found["filename"])


def split_of(reference: HubReference, split: str | None) -> str:
    """The split to read: the file's own, the requested one, the suite's usual one, or ``"train"``."""
    if reference.filename:
        return reference.filename.rsplit("/", 1)[-1].split(".")[0]
    return split or SUITES.get(reference.name, "train")


def fetch_questions_file(reference: HubReference, split: str | None) -> HubQuestions:
    """Downloads the file of one split, or finds it in the hub's cache.

    Args:
        reference: one of :data:`SUITES`, or any data set with ``<split>.parquet`` or ``<split>.jsonl``.
        split: None means the suite's usual split, or ``"train"`` for other data sets.

    Raises:
        QuestionsError: the data set, revision or split does not exist, or the hub cannot be reached.
    """
    repository = FLASHRAG if reference.name in SUITES else reference.name
    split = split_of(reference, split)
    stem = f"{reference.name}/{split}" if reference.name in SUITES else split
    suffixes = ("jsonl",) if reference.name in SUITES else ("parquet", "jsonl")
    tried = tuple(f"{folder}{stem}.{suffix}" for folder in ("", "data/") for suffix in suffixes)
    for filename in (reference.filename,) if reference.filename else tried:
        if path := _fetch(repository, filename, reference.revision):
            # …/snapshots/<commit>/<filename>
            return HubQuestions(path, repository, path.parents[filename.count("/")].name, filename)
    raise QuestionsError(
        f"the Hugging Face data set {repository} has no file {reference.filename or ' or '.join(tried)}: "
        "name another split, or download the file you mean and give its path"
    )


def _fetch(repository: str, filename: str, revision: str | None) -> Path | None:
    """The file in the hub's cache; None if the data set has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        return Path(
            hf_hub_download(repository, filename, repo_type="dataset", revision=revision, endpoint=endpoint),
        )
    except LocalEntryNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face hub cannot be reached for {repository} ({filename}), and the file is not in the hub's "
            "cache: go online, pass the path of a file you downloaded, or use the built-in 'atlas'"
        ) from error
    except EntryNotFoundError:
        return None
    except RevisionNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face data set {repository} has no revision {revision!r}: use an existing commit, branch or tag"
        ) from error
    except RepositoryNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face data set {repository!r} does not exist or is not accessible: check its name, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub's client lets errors of its transport through
        raise QuestionsError(
            f"{filename} of the Hugging Face data set {repository} cannot be downloaded "
            f"({type(error).__name__}): download it yourself and pass its path, or use the built-in 'atlas'"
        ) from error
