"""Downloads trained weights: exports a training state as a PEFT adapter and fetches it through signed URLs."""

from __future__ import annotations

import logging
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

import aiohttp
import anyio
import anyio.to_thread

from searchr1_async.errors import ExportError, ServiceError
from searchr1_async.service.connection import Service

logger = logging.getLogger(__name__)

EXTERNAL_SECONDS = 3600
"""TTL of the temporary external weights if they cannot be deleted: the shortest that Tinker accepts."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Backoff in seconds between retries; any received byte resets it."""
_DELETE_SECONDS = 15.0
_MARGIN = timedelta(minutes=5)
"""URLs that expire within this time are signed again before the next file."""
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


async def download_adapter(service: Service, state_path: str, folder: Path) -> None:
    """Downloads the adapter of a training state into an empty folder.

    Loads the state (``tinker://…/weights/…``) in a separate session, saves it as external weights and deletes these after the
    download. Raises ServiceError if the state is gone or external weights are not offered, ExportError if the download fails.
    """
    async with service.session() as own:
        client = await own.load_weights(state_path)
        path = await own.save_external(client, f"export-{secrets.token_hex(4)}", ttl_seconds=EXTERNAL_SECONDS)
        try:
            await _Download(own, path, folder).run()
        finally:
            with anyio.move_on_after(_DELETE_SECONDS, shield=True):
                try:
                    await own.delete_checkpoint(path)
                except ServiceError as error:
                    logger.info("%s could not be deleted and expires in an hour: %s", path, error)


class _Download:
    def __init__(self, service: Service, path: str, folder: Path) -> None:
        self._service, self._path, self._folder = service, path, folder
        self._urls: dict[str, str] = {}
        self._expires = datetime.min.replace(tzinfo=UTC)

    async def run(self) -> None:
        await self._sign()
        if not self._urls:
            raise ExportError(f"{self._path} has no files")
        for name in self._urls:
            parts = PurePosixPath(name).parts
            if not parts or name.startswith("/") or ".." in parts or set(name) & {"\\", ":", "\0"}:
                raise ExportError(f"the service lists a file {name!r}, which is outside the folder")
        # Without the API key: the URLs may point to another host.
        async with aiohttp.ClientSession(timeout=_TIMEOUT, trust_env=True, auto_decompress=False) as session:
            for name in sorted(self._urls):
                if datetime.now(UTC) >= self._expires - _MARGIN:
                    await self._sign()
                target = self._folder / name
                try:
                    await anyio.Path(target.parent).mkdir(parents=True, exist_ok=True)
                    await self._file(session, name, target)
                except OSError as error:
                    if isinstance(error, aiohttp.ClientError | TimeoutError):
                        raise
                    raise ExportError(f"{target} cannot be written: {error.strerror or error}") from error

    async def _sign(self) -> None:
        answer = await self._service.external_urls(self._path)
        if missing := set(self._urls) - set(answer.urls):
            raise ExportError(f"the service no longer signs {min(missing)} of {self._path}: export again")
        self._urls, self._expires = dict(answer.urls), answer.expires

    async def _file(self, session: aiohttp.ClientSession, name: str, target: Path) -> None:
        """Downloads a file, resuming after interruptions and signing again if the URL is rejected."""
        failures = 0
        async with await anyio.open_file(target, "wb") as output:
            while True:
                before = await output.tell()
                try:
                    if await self._part(session, name, output):
                        return
                    reason = "the response ended early"
                except (aiohttp.ClientError, TimeoutError) as error:
                    reason = f"HTTP {error.status}" if isinstance(error, aiohttp.ClientResponseError) else str(error)
                    reason = reason or type(error).__name__
                    if isinstance(error, aiohttp.ClientResponseError) and error.status in (401, 403, 410):
                        await self._sign()
                failures = 0 if await output.tell() > before else failures
                if failures == len(PAUSES):
                    raise ExportError(
                        f"{name} of {self._path} could not be downloaded ({reason}) in {failures + 1} attempts: check the "
                        "connection and export again"
                    )
                logger.info("%s of %s: %s; retrying in %g s", name, self._path, reason, PAUSES[failures])
                await anyio.sleep(PAUSES[failures])
                failures += 1

    async def _part(self, session: aiohttp.ClientSession, name: str, output: anyio.AsyncFile[bytes]) -> bool:
        """Downloads the missing part; returns whether the file is complete."""
        start = await output.tell()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        async with session.get(self._urls[name], headers=headers) as response:
            response.raise_for_status()
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                await output.seek(0)
                await output.truncate()
                start = 0
            size = response.headers.get("Content-Length")
            async for chunk in response.content.iter_chunked(1 << 20):
                await output.write(chunk)
            return size is None or await output.tell() == start + int(size)
