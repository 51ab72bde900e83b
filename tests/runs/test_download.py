"""Downloads by signed URLs: resumed, signed again when rejected, only the adapter's own files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from searchr1_async.errors import ExportError, ServiceError
from searchr1_async.runs import export as download
from searchr1_async.runs.export import download_adapter
from searchr1_async.service.connection import Service

pytestmark = pytest.mark.anyio

CONTENT = bytes(range(256)) * 4096


@dataclass
class Store:
    """An object store with signed URLs and injectable faults."""

    names: tuple[str, ...] = ("adapter_config.json", "adapter_model.safetensors")
    cuts: list[int] = field(default_factory=list)
    """Responses are cut after these numbers of bytes, in turn."""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next responses."""
    takes_ranges: bool = True
    url: str = ""
    signed: int = 0
    ranges: list[str | None] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    async def give(self, request: web.Request) -> web.StreamResponse:
        self.ranges.append(request.headers.get("Range"))
        assert "X-API-Key" not in request.headers
        assert "Authorization" not in request.headers
        if self.statuses:
            return web.Response(status=self.statuses.pop(0))
        if request.query["signature"] != str(self.signed):
            return web.Response(status=403)
        start = request.http_range.start or 0 if self.takes_ranges else 0
        body = CONTENT[start:]
        headers = {"Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        answer = web.StreamResponse(status=206 if start else 200, headers=headers)
        await answer.prepare(request)
        count = self.cuts.pop(0) if self.cuts else len(body)
        await answer.write(body[:count])
        if count < len(body) and request.transport is not None:
            request.transport.close()
        return answer


@dataclass(frozen=True, slots=True)
class StoredService(Service):
    """The service calls of a download, over a store; test_export uses real ones."""

    store: Any = None

    async def load_weights(self, state_path: str) -> Any:
        if state_path.endswith("gone"):
            raise ServiceError("it is gone")
        return object()

    async def save_external(self, client: Any, name: str, *, ttl_seconds: int) -> str:
        assert ttl_seconds >= 3600, "Tinker takes no less"
        return f"tinker://run/external_weights/{name}"

    async def external_urls(self, path: str) -> Any:
        self.store.signed += 1
        urls = {
            name: f"{self.store.url}/{index}?signature={self.store.signed}"
            for index, name in enumerate(self.store.names)
        }

        @dataclass
        class Answer:
            urls: dict[str, str]

        return Answer(urls)

    async def delete_checkpoint(self, path: str) -> None:
        self.store.deleted.append(path)


@asynccontextmanager
async def serving(store: Store) -> AsyncIterator[Service]:
    app = web.Application()
    app.router.add_get("/{file}", store.give)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        store.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        client: Any = None
        yield StoredService(client, "model", None, store=store)
    finally:
        await runner.cleanup()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))


async def fetch(store: Store, folder: Path) -> bytes:
    async with serving(store) as service:
        await download_adapter(service, "tinker://run/weights/a", folder)
    assert len(store.deleted) == 1, "the temporary weights are deleted"
    contents = {(folder / name).read_bytes() for name in store.names}
    return contents.pop() if len(contents) == 1 else b""


async def test_a_download_that_breaks_off_is_continued(tmp_path: Path) -> None:
    store = Store(cuts=[1000, 50_000, 7])
    assert await fetch(store, tmp_path) == CONTENT
    assert [asked is None for asked in store.ranges] == [True, False, False, False, True], "the second file is whole"


async def test_attempts_are_counted_since_the_last_byte(tmp_path: Path) -> None:
    store = Store(cuts=[1000] * 20)
    assert await fetch(store, tmp_path) == CONTENT
    assert len(store.ranges) == 22


async def test_a_store_without_ranges_is_asked_for_the_whole(tmp_path: Path) -> None:
    assert await fetch(Store(cuts=[1000, 2000], takes_ranges=False), tmp_path) == CONTENT


@pytest.mark.parametrize("status", [401, 403, 410])
async def test_a_url_that_is_refused_is_signed_again(tmp_path: Path, status: int) -> None:
    store = Store(statuses=[status])
    assert await fetch(store, tmp_path) == CONTENT
    assert store.signed == 3


async def test_a_store_that_stays_away_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    store = Store(statuses=[503] * 10)
    with pytest.raises(ExportError, match=r"could not be downloaded \(HTTP 503\) in 4 attempts"):
        await fetch(store, tmp_path)
    assert len(store.deleted) == 1


@pytest.mark.parametrize("names", [(), ("../adapter_config.json", "adapter_model.safetensors")])
async def test_other_files_and_no_weights_are_errors(tmp_path: Path, names: tuple[str, ...]) -> None:
    store = Store(names=names)
    with pytest.raises(ExportError, match="has no adapter_config"):
        await fetch(store, tmp_path)
    assert store.ranges == []
    async with serving(store := Store()) as service:
        with pytest.raises(ServiceError, match="it is gone"):
            await download_adapter(service, "tinker://run/weights/gone", tmp_path)
    assert store.deleted == []
