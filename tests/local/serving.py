"""An embedded service in a thread, and a plain HTTP client for requests that the SDK never sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import anyio.to_thread
import tinker
from tinker import types

from searchr1_async.local import process
from searchr1_async.local.backend import Backend
from searchr1_async.local.checkpoint_files import CheckpointStore
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.local.server import ServiceOptions, serve

KEY = "tml-test-key"


def successors(prompt: list[int], chance: random.Random) -> list[int]:
    """Default reply: the prompt's last four tokens plus one, then token 2."""
    return [token + 1 for token in prompt[-4:]] + [2]


@dataclass(frozen=True)
class Served:
    url: str
    backend: Backend
    folder: Path


def free_listener() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    return listener


@contextmanager
def service_thread(folder: Path, backend: Backend | None = None, **options: Any) -> Iterator[Served]:
    """Serves on another thread, so that the SDK's blocking calls cannot block the server."""
    backend = backend or ScriptedBackend(successors)
    started = threading.Event()
    state: dict[str, Any] = {}

    async def run() -> None:
        state["stop"] = asyncio.Event()
        state["loop"] = asyncio.get_running_loop()
        store = CheckpointStore(folder)
        async with serve(
            backend, checkpoints=store, api_key=KEY, listener=free_listener(), options=ServiceOptions(**options)
        ) as url:
            state["url"] = url
            started.set()
            await state["stop"].wait()

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            state["error"] = error
        finally:
            started.set()

    thread = threading.Thread(target=main, name="service")
    thread.start()
    started.wait(30)
    if "url" not in state:
        raise RuntimeError("the service did not start") from state.get("error")
    try:
        yield Served(state["url"], backend, folder)
    finally:
        with contextlib.suppress(RuntimeError):
            state["loop"].call_soon_threadsafe(state["stop"].set)
        thread.join(30)
        backend.close()
    if "error" in state:
        raise state["error"]


@asynccontextmanager
async def sdk(url: str, key: str = KEY) -> AsyncIterator[tinker.ServiceClient]:
    """A ``ServiceClient`` that is closed on exit."""
    service = await anyio.to_thread.run_sync(lambda: tinker.ServiceClient(base_url=url, api_key=key))
    try:
        # The first call that needs a session blocks, so run it in a worker thread.
        await anyio.to_thread.run_sync(lambda: service.holder)
        yield service
    finally:
        await service.close("success")


async def rest(served: Served) -> tinker.RestClient:
    # The first use of a URL blocks.
    return await anyio.to_thread.run_sync(lambda: tinker.RestClient(base_url=served.url, api_key=KEY))


class Raw:
    """JSON and protobuf over HTTP, with statuses."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def ask(
        self, path: str, fields: Any = None, *, body: bytes | None = None, method: str = "POST"
    ) -> tuple[int, Any]:
        """Status and JSON response (None: empty; bytes: not JSON)."""
        data = {"data": body} if body is not None else {"json": fields if fields is not None else {}}
        if method in ("GET", "DELETE"):
            data = {}
        async with self._session.request(method, f"{self._url}/api/v1/{path}", **data) as response:
            content = await response.read()
            if response.content_type.endswith("json"):
                return response.status, await response.json()
            return response.status, content or None

    async def ok(self, path: str, fields: Any = None, **more: Any) -> Any:
        status, answer = await self.ask(path, fields, **more)
        assert status in (200, 204), (status, answer)
        return answer

    async def result(self, future: Mapping[str, Any]) -> Any:
        while True:
            status, answer = await self.ask("retrieve_future", {"request_id": future["request_id"]})
            if status != 408:
                assert status == 200, (status, answer)
                return answer

    async def session(self) -> str:
        fields = {"tags": [], "user_metadata": None, "sdk_version": "0.38.0"}
        return (await self.ok("create_session", fields))["session_id"]

    async def model(self, session: str, number: int = 0, **more: Any) -> str:
        fields = {"session_id": session, "model_seq_id": number, "base_model": "scripted", **more}
        return (await self.result(await self.ok("create_model", fields)))["model_id"]

    async def sampler(self, session: str, number: int = 0, **more: Any) -> str:
        fields = {"session_id": session, "sampling_session_seq_id": number, **(more or {"base_model": "scripted"})}
        return (await self.ok("create_sampling_session", fields))["sampling_session_id"]


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    """Polls ``condition`` until it is true."""
    with anyio.fail_after(seconds):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.01)


@asynccontextmanager
async def raw(url: str, key: str | None = KEY) -> AsyncIterator[Raw]:
    headers = {} if key is None else {"X-API-Key": key}
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        yield Raw(session, url)


def sample_fields(sampler: str, seq_id: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 8},
        **more,
    }


def datum(tokens: list[int], **columns: list[float]) -> types.Datum:
    """Inputs are ``tokens[:-1]``, targets ``tokens[1:]``."""
    length = len(tokens) - 1
    inputs: dict[str, Any] = {"target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[length])}
    for name, values in columns.items():
        inputs[name] = types.TensorData(data=values, dtype="float32", shape=[length])
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def read_log(path: Path) -> list[process.Served]:
    """The requests in a scripted backend's ``latency_log``."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        process.Served(**row | {"sequences": tuple(process.ServedSequence(**one) for one in row["sequences"])})
        for row in rows
    ]
