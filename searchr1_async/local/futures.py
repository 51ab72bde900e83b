"""Routes to poll, fetch and cancel results."""

from __future__ import annotations

import time

import anyio
from aiohttp import web

from searchr1_async.local import protocol
from searchr1_async.local.answers import Gone, NotFound, json_answer
from searchr1_async.local.promises import Failure, Promise, PromiseStore, UnknownPromise
from searchr1_async.local.protocol import Body
from searchr1_async.local.sampling import Sampling
from searchr1_async.local.sessions import Sessions

_ANNOUNCED_BYTES = 1 << 20
"""Larger results are announced first, so that the client can limit concurrent downloads."""


class Futures:
    """The routes of open requests and their results. ``poll`` is the long-poll timeout in seconds."""

    def __init__(self, promises: PromiseStore, sampling: Sampling, sessions: Sessions, *, poll: float) -> None:
        self._promises = promises
        self._sampling = sampling
        self._sessions = sessions
        self._poll = poll

    def add_routes(self, app: web.Application, prefix: str) -> None:
        app.router.add_post(f"{prefix}/retrieve_future", self.retrieve_future)
        app.router.add_post(f"{prefix}/retrieve_futures", self.retrieve_futures)
        app.router.add_post(f"{prefix}/cancel_future", self.cancel_future)

    async def retrieve_future(self, request: web.Request) -> web.Response:
        body = Body.parse(await request.read())
        promise = self._promise(body.text("request_id"))
        outcome = await self._promises.wait(promise, self._poll)
        if outcome is None:
            return json_answer(408, type="try_again", request_id=promise.request_id, queue_state="active")
        if isinstance(outcome, Failure):
            self._promises.fetched(promise, time.monotonic())
            return json_answer(error=outcome.error, category=outcome.category)
        if body.fields.get("allow_metadata_only") is True and len(outcome.body) > _ANNOUNCED_BYTES:
            return json_answer(status="complete_metadata", response_payload_size=len(outcome.body))
        self._promises.fetched(promise, time.monotonic())
        return web.Response(body=outcome.body, content_type=outcome.content_type)

    async def retrieve_futures(self, request: web.Request) -> web.Response:
        """Lists a sampling client's settled requests; their results are fetched one by one."""
        fields = Body.parse(await request.read()).fields
        target = Body(protocol.optional(fields, "target", dict, {}))
        clone = target.optional_number("cloned_sampler_id") or 0
        id = target.text("sampling_session_id")
        seen = Body(fields).optional_number("prev_cursor") or 0
        seconds = min(max(protocol.optional(fields, "timeout", float, self._poll), 0.0), self._poll)
        session = self._sessions.known.get(id.partition(":")[0])
        if session is not None and session.finished:
            # A closing client keeps polling briefly and would log an error response.
            await anyio.sleep(min(seconds, 1.0))
            return json_answer(completions=[], cursor=seen)
        settled, cursor = await self._sampling.log_of(self._sampling.find(id), clone).after(seen, seconds)
        completions = [
            {
                "state": "failed" if isinstance(promise.outcome, Failure) else "finished",
                "request_id": promise.request_id,
            }
            for promise in settled
        ]
        return json_answer(completions=completions, cursor=cursor)

    def _promise(self, request_id: str) -> Promise:
        try:
            return self._promises.get(request_id)
        except UnknownPromise as error:
            if error.expired:
                raise Gone(f"the result of request {request_id!r} was fetched and is no longer kept") from None
            raise NotFound(f"no request {request_id!r}: unknown id, or the service was restarted") from None

    async def cancel_future(self, request: web.Request) -> web.Response:
        """Cancels a sample. Training requests cannot be cancelled, since later ones depend on them."""
        promise = self._promise(Body.parse(await request.read()).text("request_id"))
        self._promises.cancel(promise, time.monotonic())
        return web.Response(status=204)
