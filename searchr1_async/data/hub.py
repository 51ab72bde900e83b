"""The Hugging Face hub: question files of public data sets, and large files, downloaded resumably and verified.

``hf_hub_download`` is unsuitable for large files: interrupted, it deletes its temporary file and starts over, and it refuses files over
50 GB without Xet (huggingface_hub 2.4).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

import aiohttp
import anyio.from_thread

from searchr1_async.boundary.network import seconds_asked
from searchr1_async.boundary.paths import write_all
from searchr1_async.boundary.waits import Notify, in_thread, pause
from searchr1_async.errors import QuestionsError, StoreError

logger = logging.getLogger(__name__)

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
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(rf"(?P<name>{_NAME}|{'|'.join(SUITES)})(?:@(?P<revision>[\w.-]+)(?:/(?P<filename>[^#]+))?)?")

Advance = Callable[[int], None]
"""Receives the bytes done so far; called from the event loop."""

PART = 4 << 30
"""Bytes per request: the hub refuses responses over 50 GB, and its download URLs expire."""
BLOCK = 4 << 20
"""Bytes per write; about this much is fetched again after a kill."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 120.0)
"""Seconds between retries; reset whenever bytes arrive."""
LONGEST_WAIT = 600.0
"""Maximum ``Retry-After``, in seconds."""
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A reference to a data set on the hub; as text, what :func:`read_reference` reads."""

    name: str
    """A key of :data:`SUITES`, or ``"org/name"``."""
    revision: str | None = None
    """A commit, branch or tag; None is the latest."""
    filename: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}/{self.filename}"


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


def fetch_questions_file(reference: HubReference, split: str) -> tuple[Path, HubReference]:
    """Downloads the file ``<split>.parquet`` or ``.jsonl``, or finds it in the hub's cache; with its reference, pinned to a commit.

    Raises:
        QuestionsError: the data set, revision or split does not exist, or the hub cannot be reached.
    """
    is_suite = reference.name in SUITES
    repository, stem = (FLASHRAG, f"{reference.name}/{split}") if is_suite else (reference.name, split)
    suffixes = ("jsonl",) if is_suite else ("parquet", "jsonl")
    tried = tuple(f"{folder}{stem}.{suffix}" for folder in ("", "data/") for suffix in suffixes)
    for filename in (reference.filename,) if reference.filename else tried:
        if path := _fetch(repository, filename, reference.revision):
            commit = path.parents[filename.count("/")].name  # …/snapshots/<commit>/<filename>
            return path, HubReference(repository, commit, filename)
    raise QuestionsError(
        f"the Hugging Face data set {repository} has no file {reference.filename or ' or '.join(tried)}: "
        "name another split, or download the file you mean and give its path"
    )


def _fetch(repository: str, filename: str, revision: str | None) -> Path | None:
    """The file in the hub's cache; None if the data set has no such file."""
    from huggingface_hub import errors, hf_hub_download

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset", revision=revision, endpoint=endpoint))
    except errors.LocalEntryNotFoundError as error:
        problem, cause = "the hub cannot be reached, and the file is not in its cache", error
    except errors.EntryNotFoundError:
        return None
    except errors.RevisionNotFoundError as error:
        problem, cause = f"it has no revision {revision!r}", error
    except errors.RepositoryNotFoundError as error:
        problem, cause = "it does not exist, or is private: `hf auth login`", error
    except Exception as error:  # the hub's client lets errors of its transport through
        problem, cause = type(error).__name__, error
    raise QuestionsError(
        f"{filename} of the Hugging Face data set {repository!r} cannot be downloaded ({problem}): pass the path of a file "
        "that you downloaded, or use the built-in 'atlas'"
    ) from cause


@dataclass(frozen=True, slots=True)
class HubFile:
    """A large file of a data set on the hub."""

    name: str
    """For messages."""
    url: str
    """Pinned to a commit, so that a push to the hub cannot change the file during the download."""
    size: int
    sha256: str
    headers: dict[str, str] = field(repr=False)
    """Includes the user's token, if any; never shown."""


def look_up(repository: str, filename: str) -> HubFile:
    """Asks the hub, or ``$HF_ENDPOINT``, for a large file of a data set ``org/name``. Blocking. Raises StoreError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    name, endpoint = f"{filename} of {repository} on the Hugging Face hub", os.environ.get("HF_ENDPOINT") or None
    url_of = partial(hf_hub_url, repository, filename, repo_type="dataset", endpoint=endpoint)
    try:
        found = get_hf_file_metadata(url_of(), timeout=30, endpoint=endpoint)
    except Exception as error:  # also those of its transport
        raise StoreError(
            f"{name} is not available ({type(error).__name__}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or set HF_TOKEN "
            "if the data set is not public"
        ) from error
    if found.size is None or not re.fullmatch(r"[0-9a-f]{64}", found.etag or ""):
        raise StoreError(f"{name} has no size or checksum: it is not stored as a large file there")
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    return HubFile(name, url_of(revision=found.commit_hash), found.size, str(found.etag), headers)


async def download(file: HubFile, target: Path, advance: Advance, notify: Notify) -> None:
    """Appends what ``target`` lacks of the file, and creates it if missing. Existing bytes are trusted until :func:`verify`.

    ``advance`` is called with the bytes present, ``notify`` with each wait over 5 seconds.

    Raises:
        StoreError: the hub rejects the request, is down for longer than all retries, or asks for too long a wait.
        OSError: the file cannot be written.
    """
    async with download_session(file.headers) as session:
        with target.open("ab", buffering=0) as output:
            if output.tell() > file.size:
                output.truncate(0)
            advance(output.tell())

            async def one_part() -> bool:
                start = output.tell()
                end = min(start + PART, file.size)
                if start < end:
                    # aiohttp drops the token when the hub redirects to another host.
                    async with session.get(file.url, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
                        response.raise_for_status()
                        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                            raise StoreError(f"a proxy ignores byte ranges of {file.name}: download it another way")
                        await append_body(response, output, advance)
                    if output.tell() < end:
                        raise aiohttp.ClientPayloadError(f"the response ended {end - output.tell()} bytes early")
                return end == file.size

            await retried(one_part, output.tell, PAUSES, partial(_wait, file, notify))


async def _wait(file: HubFile, notify: Notify, error: Exception, seconds: float | None) -> None:
    """Waits as long as the hub asks for, at least ``seconds``. Raises StoreError if it is not worth it."""
    status, asked = 0, 0.0
    if isinstance(error, aiohttp.ClientResponseError):
        status = error.status
        asked = seconds_asked((error.headers or {}).get("Retry-After", ""), datetime.now(UTC)) or 0.0
    failed = f"the download of {file.name} failed ({fault_of(error)})"
    if seconds is None or asked > LONGEST_WAIT or status in (401, 403, 404):
        wait = f", after the {asked:,.0f} s that the hub asks for" if asked else ""
        raise StoreError(
            f"{failed}: check the network, and HF_TOKEN if the data set is not public; the partial download is kept: run the same "
            f"command again{wait}"
        ) from error
    logger.info("%s: retrying", failed)
    await pause(max(asked, seconds), failed, notify)


def verify(file: HubFile, path: Path, advance: Advance) -> None:
    """Hashes the file. Deletes it and raises StoreError if its checksum differs from the hub's. Blocking."""
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
