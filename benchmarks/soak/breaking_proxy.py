"""A proxy before a Tinker service that breaks some of what passes: refusals, lost requests, lost answers, slow ones.

    python -m benchmarks.soak.breaking_proxy http://127.0.0.1:1234 --rate 0.05

What is broken is drawn with a seed, by the kind of request: training requests come in an order that a refusal would leave a
hole in, so they only get lost on the way or on the way back, as in a network.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
from aiohttp import web

from benchmarks.shared.processes import child_environment, command_of

SLOW_SECONDS = 3.0
SAMPLING = ("429", "500", "503", "reset", "lost answer", "slow")
RESULTS = ("500", "503", "reset", "lost answer", "slow", "failed")
"""Of polls for a sample's result; ``failed`` says that the service gave up on it, which fails its episode."""
TRAINING = ("500", "503", "reset", "lost answer", "slow")
UNTOUCHED = ("client/", "create_", "session", "healthz", "telemetry", "get_", "weights_info", "load_weights")
"""How the paths begin of what a session's start and its heartbeat need."""
FAILED_OF_FAULTS = 0.2
"""Polls drawn to fail are failed only so often: each costs an episode."""


class BreakingProxy:
    """One server in front of another.

    Args:
        target: base URL of the service.
        rate: fraction of the requests that are broken.
        seed: of what is drawn.
    """

    def __init__(self, target: str, rate: float, seed: int = 0) -> None:
        self._target, self._rate = target.rstrip("/"), rate
        self._random = random.Random(seed)
        self.requests = 0
        self.faults: Counter[str] = Counter()

    @asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[str]:
        """Yields its base URL."""
        application = web.Application(client_max_size=1 << 28)
        application.router.add_get("/proxy/counts", self._show_counts)
        application.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=timeout) as self._session:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
            try:
                yield f"http://127.0.0.1:{runner.addresses[0][1]}"
            finally:
                await runner.cleanup()

    async def _show_counts(self, request: web.Request) -> web.Response:
        return web.json_response({"requests": self.requests, "faults": dict(self.faults)})

    def _drawn(self, request: web.Request) -> str | None:
        path = request.path.partition("/api/v1/")[2]
        self.requests += 1
        if request.method != "POST" or path.startswith(UNTOUCHED) or self._random.random() >= self._rate:
            return None
        if path == "asample":
            return self._random.choice(SAMPLING)
        if path == "retrieve_future" and request.headers.get("X-Tinker-Request-Type") == "Sample":
            fault = self._random.choice(RESULTS)
            return None if fault == "failed" and self._random.random() > FAILED_OF_FAULTS else fault
        return self._random.choice(TRAINING)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = self._drawn(request)
        if fault is not None:
            self.faults[f"{request.path.rpartition('/')[2]}: {fault}"] += 1
        match fault:
            case "429":
                return web.json_response({"detail": "too many requests"}, status=429, headers={"Retry-After": "1"})
            case "500" | "503":
                return web.json_response({"detail": "trouble"}, status=int(fault))
            case "failed":
                return web.json_response({"error": "the sampler was lost", "category": "server"})
            case "reset":
                return self._reset(request)
            case "slow":
                await asyncio.sleep(SLOW_SECONDS * self._random.random())
        dropped = ("host", "connection", "content-length", "transfer-encoding")
        headers = {key: value for key, value in request.headers.items() if key.lower() not in dropped}
        try:
            async with self._session.request(
                request.method, f"{self._target}{request.rel_url}", data=body, headers=headers
            ) as answer:
                content = await answer.read()
                kept = {key: value for key, value in answer.headers.items() if key.lower().startswith("content-")}
                kept.pop("Content-Length", None)
        except aiohttp.ClientError:
            return self._reset(request)
        if fault == "lost answer":
            return self._reset(request)
        return web.Response(status=answer.status, body=content, headers=kept)

    def _reset(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


@asynccontextmanager
async def proxy_process(target: str, rate: float, seed: int = 0) -> AsyncIterator[str]:
    """A proxy in a process of its own; yields its base URL.

    Raises:
        RuntimeError: it did not come up within 30 seconds.
    """
    process = await asyncio.create_subprocess_exec(
        *command_of("benchmarks.soak.breaking_proxy", target, "--rate", str(rate), "--seed", str(seed)),
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    assert process.stdout is not None
    try:
        line = ""
        with suppress(TimeoutError):
            line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        if not line.startswith("http://"):
            raise RuntimeError("the proxy did not come up")
        yield line
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def counts_of(base_url: str) -> dict[str, int]:
    """The faults of a proxy at this URL, by request and kind, and all its ``requests``."""
    async with aiohttp.ClientSession() as session, session.get(f"{base_url}/proxy/counts") as answer:
        counts = await answer.json()
    return {"requests": counts["requests"], **counts["faults"]}


async def _serve(target: str, rate: float, seed: int, port: int) -> None:
    async with BreakingProxy(target, rate, seed).serve(port) as url:
        print(url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Breaks some of what passes to a Tinker service.")
    parser.add_argument("target")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(options.target, options.rate, options.seed, options.port))
