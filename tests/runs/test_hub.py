"""Uploads to a fake Hugging Face hub."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio.to_thread
import pytest
from aiohttp import web

from searchr1_async.errors import ConfigurationError, ExportError
from searchr1_async.runs.export import check_hub_name, push

pytestmark = pytest.mark.anyio


@dataclass
class Hub:
    """The routes used by an upload of small files."""

    refusal: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool | None = None
    url: str = ""

    async def create(self, request: web.Request) -> web.Response:
        if self.refusal is not None:
            return web.json_response({"error": "no"}, status=self.refusal)
        fields = await request.json()
        self.private = fields.get("private", fields.get("visibility") == "private")
        owner = fields.get("organization") or "me"
        return web.json_response({"url": f"{self.url}/{owner}/{fields['name']}", "name": f"{owner}/{fields['name']}"})

    async def preupload(self, request: web.Request) -> web.Response:
        files = (await request.json())["files"]
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
        return web.json_response({"files": modes})

    async def commit(self, request: web.Request) -> web.Response:
        for line in (await request.read()).splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                self.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
        answer = {"commitUrl": f"{self.url}/me/model/commit/abc", "commitOid": "abc", "success": True}
        return web.json_response(answer)

    async def info(self, request: web.Request) -> web.Response:
        if self.refusal is not None:
            return web.json_response({"error": "no"}, status=self.refusal)
        return web.json_response({"id": "me/model", "sha": "0" * 40, "siblings": [], "tags": []})

    async def anything(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=200)


@asynccontextmanager
async def serving(hub: Hub) -> AsyncIterator[Hub]:
    app = web.Application()
    app.router.add_post("/api/repos/create", hub.create)
    app.router.add_post("/api/models/{owner}/{name}/preupload/{revision}", hub.preupload)
    app.router.add_post("/api/models/{owner}/{name}/commit/{revision}", hub.commit)
    app.router.add_get("/api/models/{owner}/{name}/{rest:.*}", hub.info)
    app.router.add_get("/api/models/{owner}/{name}", hub.info)
    app.router.add_route("*", "/{rest:.*}", hub.anything)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield hub
    finally:
        await runner.cleanup()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# adapter\n")
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


def reach(monkeypatch: pytest.MonkeyPatch, url: str, *, offline: bool = False) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


async def test_a_folder_is_uploaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Hub()) as hub:
        reach(monkeypatch, hub.url)
        address = await anyio.to_thread.run_sync(lambda: push(folder, "me/model", private=True))
    assert address.endswith("/me/model")
    assert set(hub.files) >= {"README.md", "adapter_config.json"}
    assert hub.private is True


async def test_a_refusal_is_an_error_that_says_what_is_left_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(Hub(refusal=401)) as hub:
        reach(monkeypatch, hub.url)
        with pytest.raises(ExportError, match=r"401.*HF_TOKEN.*hf upload me/model") as caught:
            await anyio.to_thread.run_sync(lambda: push(folder, "me/model", private=True))
    assert "hf_secret" not in str(caught.value)


async def test_a_hub_that_is_not_there_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free_tcp_port: int
) -> None:
    reach(monkeypatch, f"http://127.0.0.1:{free_tcp_port}")
    with pytest.raises(ExportError, match="the upload to the Hugging Face hub failed"):
        await anyio.to_thread.run_sync(lambda: push(folder, "me/model", private=True))
    reach(monkeypatch, f"http://127.0.0.1:{free_tcp_port}", offline=True)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE"):
        await anyio.to_thread.run_sync(lambda: push(folder, "me/model", private=True))


@pytest.mark.parametrize("name", ["", "a/b/c", "-a", "a b", "a/"])
def test_names_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="push_to_hub"):
        check_hub_name(name)
    check_hub_name("organisation/name-1.0")
