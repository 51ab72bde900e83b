"""A server that answers the embedding requests of the google-genai client, of both its faces, without Google.

    python -m benchmarks.shared.gemini_stand_in --port 8765 --settings '{"latency": 0.2}'

It takes ``models/{model}:batchEmbedContents`` of the Gemini Developer API, and ``:embedContent``, ``:batchEmbedContents``
and ``:predict`` of Vertex AI. Its answers take time, keep a quota and fail as the settings say, and it counts what it was
asked. Within a process it is ``async with GeminiStandIn() as stand_in: stand_in.base_url``; ``stand_in_process()`` runs it in
a process of its own, so that a benchmark can tell the client's CPU time from the server's.

Error bodies have the shape that the service gives them (``google.rpc.Status``).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import ClientSession, web

from benchmarks.shared.processes import child_environment, command_of
from benchmarks.shared.stand_in_settings import Fault, StandInCounts, StandInSettings
from benchmarks.shared.word_vectors import WordVectors

__all__ = ["Fault", "GeminiStandIn", "StandInCounts", "StandInSettings", "TokenBucket", "counts_of", "stand_in_process"]


# --- quota ----------------------------------------------------------------------------------------------------------------


class TokenBucket:
    """Fills at ``rate`` a second up to ``capacity``; full at first."""

    def __init__(self, rate: float, capacity: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._capacity, self._clock = rate, capacity, clock
        self._level, self._at = capacity, clock()

    def wait_for(self, amount: float) -> float:
        """Seconds until it holds so much, 0 where it does now; more than it can hold counts as full."""
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (min(amount, self._capacity) - self._level) / self._rate)

    def take(self, amount: float) -> None:
        """Takes it out; the level may fall below zero."""
        self._level -= amount


# --- requests and answers -------------------------------------------------------------------------------------------------

_PATH = re.compile(
    r"/(?P<version>v\w+)/(?:(?:(?P<place>projects/[^/]+/locations/[^/]+)/publishers/google/)?models/(?P<model>[^/:]+))"
    r":(?P<method>embedContent|batchEmbedContents|predict)$"
)


@dataclass(frozen=True)
class _Asked:
    """One request, whatever its shape."""

    on_vertex: bool
    method: str
    credential: str
    texts: list[str]
    task_types: list[str]
    dimension: int


def _text_of(content: dict[str, Any]) -> str:
    """The text of one Content; its parts make up one input, as the service has it."""
    return "".join(part.get("text", "") for part in content.get("parts", ()))


def _read(path: re.Match[str], headers: Mapping[str, str], body: dict[str, Any], default_dimension: int) -> _Asked:
    method, on_vertex = path["method"], path["place"] is not None
    if method == "predict":
        items = [(one.get("content", ""), one.get("task_type", "")) for one in body.get("instances", ())]
        dimension = body.get("parameters", {}).get("outputDimensionality")
    else:
        requests = body.get("requests", ()) if method == "batchEmbedContents" else (body,)
        configs = [one.get("embedContentConfig", {}) if on_vertex else one for one in requests]
        items = [
            (_text_of(one.get("content", {})), config.get("taskType", ""))
            for one, config in zip(requests, configs, strict=True)
        ]
        dimension = configs[0].get("outputDimensionality") if configs else None
    credential = headers.get("x-goog-api-key") or headers.get("Authorization", "").removeprefix("Bearer ")
    texts, task_types = [text for text, _ in items], [task for _, task in items]
    return _Asked(on_vertex, method, credential, texts, task_types, dimension or default_dimension)


def _rendered_answer(asked: _Asked, vectors: list[bytes]) -> bytes:
    """The answer's body, in the shape of the method."""
    values = [b'{"values":' + vector + b"}" for vector in vectors]
    if asked.method == "predict":
        return b'{"predictions":[' + b",".join(b'{"embeddings":' + one + b"}" for one in values) + b"]}"
    if asked.method == "embedContent":
        usage = b',"usageMetadata":{"promptTokenCount":8},"truncated":false' if asked.on_vertex else b""
        return b'{"embedding":' + (values[0] if values else b"{}") + usage + b"}"
    return b'{"embeddings":[' + b",".join(values) + b"]}"


@dataclass(frozen=True)
class _Refusal:
    """An error answer."""

    status: int
    name: str
    message: str
    reason: str | None = None
    retry_after: float | None = None


_REFUSALS: Mapping[Fault, _Refusal] = {
    Fault.TOO_MANY_SILENT: _Refusal(429, "RESOURCE_EXHAUSTED", "Resource exhausted. Please try again later."),
    Fault.INTERNAL: _Refusal(500, "INTERNAL", "An internal error has occurred."),
    Fault.UNAVAILABLE: _Refusal(503, "UNAVAILABLE", "The model is overloaded. Please try again later."),
    Fault.BAD_REQUEST: _Refusal(400, "INVALID_ARGUMENT", "Request contains an invalid argument."),
    Fault.INVALID_KEY: _Refusal(
        400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", reason="API_KEY_INVALID"
    ),
    Fault.EXPIRED_TOKEN: _Refusal(
        401, "UNAUTHENTICATED", "Request had invalid authentication credentials.", reason="ACCESS_TOKEN_EXPIRED"
    ),
    Fault.FORBIDDEN: _Refusal(
        403, "PERMISSION_DENIED", "The API has not been used in this project or it is disabled.", "SERVICE_DISABLED"
    ),
    Fault.NO_SUCH_MODEL: _Refusal(404, "NOT_FOUND", "The model is not found for this version of the API."),
    Fault.WRONG_PLACE: _Refusal(400, "FAILED_PRECONDITION", "User location is not supported for the API use."),
}


class GeminiStandIn:
    """The server, in this process: ``async with`` starts it on a free port of this machine.

    Args:
        settings: how it behaves; may be exchanged while it runs, by :attr:`settings`.
        port: to listen on; 0 takes a free one.
    """

    def __init__(self, settings: StandInSettings | None = None, *, port: int = 0) -> None:
        self._port = port
        self._runner: web.AppRunner | None = None
        self._at_once = 0
        self._vectors = WordVectors()
        self.script: deque[Fault | None] = deque()
        """What happens to the next requests, one each; None is a good answer. The seeded faults follow after it."""
        self.last_request: tuple[str, dict[str, Any]] = ("", {})
        """Path and body of the newest."""
        self._arrival = asyncio.Event()
        self.base_url = ""
        self.settings = settings or StandInSettings()
        self.counts = StandInCounts()

    @property
    def settings(self) -> StandInSettings:
        return self._settings

    @settings.setter
    def settings(self, settings: StandInSettings) -> None:
        self._settings = settings
        self._random = random.Random(settings.seed)
        rate, texts = settings.requests_per_second, settings.texts_per_minute
        self._requests = TokenBucket(rate, max(1.0, rate)) if rate else None
        self._texts = TokenBucket(texts / 60, texts) if texts else None

    def forget(self) -> None:
        """Counts from zero again."""
        self.counts = StandInCounts()

    async def until(self, requests: int) -> None:
        """Waits until so many requests have come."""
        while self.counts.requests < requests:
            self._arrival.clear()
            await self._arrival.wait()

    async def __aenter__(self) -> GeminiStandIn:
        application = web.Application(client_max_size=1 << 26)
        application.router.add_get("/stand-in/counts", self._show_counts)
        application.router.add_post("/stand-in/forget", self._forget)
        application.router.add_post("/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _show_counts(self, request: web.Request) -> web.Response:
        return web.json_response({**self.counts.summary(), "cpu_seconds": time.process_time()})

    async def _forget(self, request: web.Request) -> web.Response:
        self.forget()
        return web.json_response({})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = _PATH.match(request.path)
        if path is None:
            return self._refused(_Refusal(404, "NOT_FOUND", "No such method."))
        body = orjson.loads(await request.read())
        self.last_request = request.path, body
        asked = _read(path, request.headers, body, self._settings.dimension)
        self.counts.requests += 1
        self.counts.texts += len(asked.texts)
        self.counts.methods[asked.method] += 1
        self.counts.places[path["place"] or ""] += 1
        self._at_once += 1
        self._arrival.set()
        self.counts.requests_at_once = max(self.counts.requests_at_once, self._at_once)
        try:
            return await self._answer_to(request, asked)
        finally:
            self._at_once -= 1

    async def _answer_to(self, request: web.Request, asked: _Asked) -> web.StreamResponse:
        fault = self._next_fault()
        if fault is not None:
            self.counts.faults[fault] += 1
        refusal = self._refusal(asked, fault)
        if refusal is not None:
            return self._refused(refusal, asked)
        await asyncio.sleep(self._seconds(asked))
        if fault is Fault.RESET:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault is Fault.SLOW:
            await asyncio.sleep(self._settings.slow_seconds)
        if fault is Fault.BAD_GATEWAY:
            self.counts.statuses[502] += 1
            return web.Response(status=502, text="<html>Bad Gateway</html>", content_type="text/html")
        return await self._embedded(request, asked, fault)

    def _next_fault(self) -> Fault | None:
        if self.script:
            return self.script.popleft()
        draw = self._random.random() if self._settings.fault_rates else 1.0
        for fault, rate in self._settings.fault_rates.items():
            draw -= rate
            if draw < 0:
                return fault
        return None

    def _seconds(self, asked: _Asked) -> float:
        seconds = self._settings.latency + self._settings.latency_per_text * len(asked.texts)
        if self._settings.jitter:
            seconds *= 1 + self._settings.jitter * self._random.uniform(-1, 1)
        return seconds

    def _refusal(self, asked: _Asked, fault: Fault | None) -> _Refusal | None:
        """Why the request is refused at once; None where it is not."""
        settings = self._settings
        if not asked.credential or (settings.keys and asked.credential not in settings.keys):
            return _REFUSALS[Fault.EXPIRED_TOKEN if asked.on_vertex else Fault.INVALID_KEY]
        if fault is Fault.TOO_MANY:
            return dataclasses.replace(_REFUSALS[Fault.TOO_MANY_SILENT], retry_after=settings.retry_after)
        if fault is Fault.UNAVAILABLE_TIMED:
            return dataclasses.replace(_REFUSALS[Fault.UNAVAILABLE], retry_after=settings.retry_after)
        if fault is not None and fault in _REFUSALS:
            return _REFUSALS[fault]
        if not asked.texts or not all(asked.texts):
            return _Refusal(400, "INVALID_ARGUMENT", "content is empty")
        if asked.on_vertex and len(asked.texts) > 1 and not settings.vertex_lists:
            return _Refusal(400, "INVALID_ARGUMENT", "The request holds more than one content; only one is supported.")
        if len(asked.texts) > settings.max_texts:
            return _Refusal(400, "INVALID_ARGUMENT", f"at most {settings.max_texts} requests can be in one batch")
        wait = self._wait_for_quota(len(asked.texts))
        return dataclasses.replace(_REFUSALS[Fault.TOO_MANY_SILENT], retry_after=wait) if wait else None

    def _wait_for_quota(self, texts: int) -> float:
        """Seconds until the quota allows so many texts in one request; 0 takes them out of it."""
        quotas = [(quota, n) for quota, n in ((self._requests, 1), (self._texts, texts)) if quota is not None]
        wait = max((quota.wait_for(n) for quota, n in quotas), default=0.0)
        if not wait:
            for quota, n in quotas:
                quota.take(n)
        return wait

    def _refused(self, refusal: _Refusal, asked: _Asked | None = None) -> web.Response:
        self.counts.statuses[refusal.status] += 1
        message, details, headers = refusal.message, [], {}
        if self._settings.echoes and asked is not None:
            message = f"{message} Key {asked.credential}, content: {' '.join(asked.texts)!r}"
            details.append({"@type": "type.googleapis.com/google.rpc.DebugInfo", "detail": message})
        if refusal.reason is not None:
            details.append({"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": refusal.reason})
        if refusal.status == 429:
            violation = {"quotaMetric": "embed_content_requests", "quotaId": "EmbedContentRequestsPerMinutePerProject"}
            details.append({"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]})
        if refusal.retry_after is not None and self._settings.says_when != "nowhere":
            if self._settings.says_when != "details":
                headers["Retry-After"] = str(max(1, round(refusal.retry_after + 0.49)))
            if self._settings.says_when != "header":
                delay = f"{refusal.retry_after:.9f}s"
                details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
        error = {"code": refusal.status, "message": message, "status": refusal.name, "details": details}
        return web.json_response({"error": error}, status=refusal.status, headers=headers)

    async def _embedded(self, request: web.Request, asked: _Asked, fault: Fault | None) -> web.StreamResponse:
        dimension = asked.dimension + (fault is Fault.OTHER_DIMENSION)
        vectors = [
            orjson.dumps(self._vectors.embed(text, dimension), option=orjson.OPT_SERIALIZE_NUMPY)
            for text in asked.texts
        ]
        if fault is Fault.ONE_FEWER:
            vectors.pop()
        if fault is Fault.ONE_MORE:
            vectors.append(vectors[-1])
        if fault is Fault.NOT_FINITE:
            vectors[-1] = b"[NaN," + vectors[-1].split(b",", 1)[1]
        body = b"{}" if fault is Fault.EMPTY else _rendered_answer(asked, vectors)
        self.counts.statuses[200] += 1
        if fault is Fault.BROKEN_JSON:
            body = body[: len(body) // 2]
        elif fault is Fault.CUT_SHORT:
            return await self._cut_short(request, body)
        elif fault in (None, Fault.SLOW):
            self.counts.embedded.update(zip(asked.task_types, asked.texts, strict=True))
        return web.Response(body=body, content_type="application/json", charset="utf-8")

    async def _cut_short(self, request: web.Request, body: bytes) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "application/json"})
        await answer.prepare(request)
        await answer.write(body[: len(body) // 2])
        assert request.transport is not None
        request.transport.close()
        return answer


# --- a process of its own -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def stand_in_process(settings: StandInSettings | None = None) -> AsyncIterator[str]:
    """The server in a process of its own, for benchmarks: gives its base URL.

    ``GET {base_url}/stand-in/counts`` tells :meth:`StandInCounts.summary` and the server's own CPU seconds
    (:func:`counts_of`).

    Raises:
        RuntimeError: it did not come up within 30 seconds.
    """
    process = await asyncio.create_subprocess_exec(
        *command_of(
            "benchmarks.shared.gemini_stand_in",
            "--settings",
            json.dumps(dataclasses.asdict(settings or StandInSettings())),
        ),
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    assert process.stdout is not None
    try:
        try:
            line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        except TimeoutError:
            line = ""
        if not line.startswith("http://"):
            raise RuntimeError(
                "the Gemini stand-in did not come up: run `python -m benchmarks.shared.gemini_stand_in` to see why"
            )
        yield line
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def counts_of(base_url: str, *, forget: bool = False) -> dict[str, Any]:
    """What a stand-in at this URL has counted, with its ``cpu_seconds``; then from zero again if asked."""
    async with ClientSession(base_url) as session:
        async with session.get("/stand-in/counts") as answer:
            counts = await answer.json()
        if forget:
            async with session.post("/stand-in/forget"):
                pass
    return counts


def _settings_from(text: str) -> StandInSettings:
    values = json.loads(text)
    values["keys"] = tuple(values.get("keys", ()))
    values["fault_rates"] = {Fault(fault): rate for fault, rate in values.get("fault_rates", {}).items()}
    return StandInSettings(**values)


async def _serve(settings: StandInSettings, port: int) -> None:
    async with GeminiStandIn(settings, port=port) as stand_in:
        print(stand_in.base_url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="to listen on; 0 takes a free one")
    parser.add_argument("--settings", type=_settings_from, default=StandInSettings(), help="StandInSettings as JSON")
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(options.settings, options.port))


if __name__ == "__main__":
    main()
