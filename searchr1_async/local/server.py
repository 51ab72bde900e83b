"""The embedded Tinker service: an aiohttp server for one backend, speaking the wire protocol of ``tinker`` 0.38.

:func:`serve` runs it in this process; :mod:`searchr1_async.local.process` runs it out-of-process.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
from aiohttp import web

from searchr1_async.errors import ConfigurationError
from searchr1_async.local import protocol
from searchr1_async.local.backend import MAX_SAMPLES, Backend, Snapshot, UserFault
from searchr1_async.local.checkpoint_files import CheckpointStore, Kind, RecordStore
from searchr1_async.local.listings import External, Listings
from searchr1_async.local.protocol import Body, body_of, optional
from searchr1_async.local.provenance import DAY, SequenceStore, sequence_id
from searchr1_async.local.replies import (
    API,
    Failure,
    Handler,
    Jobs,
    NotFound,
    Promise,
    PromiseStore,
    Reply,
    as_json,
    json_response,
    key_check,
    offload,
)
from searchr1_async.local.sessions import Sampling, Session, Sessions, sampler_id
from searchr1_async.local.trainable_models import Model, Training, model_id

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 5.0
_KEEP_ALIVE_SECONDS = 3600.0
"""Longer than any client pause, so that no request races a connection being closed."""
_MAX_BODY_BYTES = 512 << 20
_ANNOUNCED_BYTES = 1 << 20
"""Larger results are announced first, so that the client can limit concurrent downloads."""


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Limits of the service. Times are seconds."""

    poll: float = 30.0
    """Long-poll timeout of results; the SDK gives up after 45 s."""
    shared_polls: bool = True
    """One long poll of a sampling client waits for all of its samples, instead of one each."""
    max_samples: int = 8192
    """Maximum number of open sample requests; beyond it the service answers 429."""
    max_snapshots: int = 8
    """Adapter snapshots kept in memory for samplers."""
    gap_patience: float = 120.0
    """How long a model's requests wait for a missing earlier request."""
    session_idle: float = 3600.0
    """A session without a heartbeat for this long is ended (the SDK sends one every 10 s)."""
    result_grace: float = 60.0
    """How long a fetched result is kept, in case the client retries."""
    sequence_life: float = DAY
    """How long a recorded sequence can be trained on after its last use."""
    sequence_bytes: int = 1 << 30
    """Memory limit for recorded sequences (LRU eviction): 4 bytes per prompt token, 8 per sampled token."""
    listed: tuple[str, ...] = ()
    """Model names to advertise in place of the backend's own, to stand in for another service."""


@asynccontextmanager
async def serve(
    backend: Backend,
    *,
    checkpoints: CheckpointStore,
    api_key: str,
    listener: socket.socket,
    options: ServiceOptions | None = None,
) -> AsyncIterator[str]:
    """Serves until the block exits; yields the base URL. Does not close the backend.

    ``listener`` must be bound to a loopback address (else :class:`ConfigurationError`).
    """
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        raise ConfigurationError(f"the embedded service binds to the loopback interface only, not to {host!r}")
    async with anyio.create_task_group() as tasks:
        service = Service(backend, checkpoints, Jobs(PromiseStore(), tasks), options or ServiceOptions())
        await anyio.to_thread.run_sync(checkpoints.clean, time.time())
        await anyio.to_thread.run_sync(service.records.read)
        tasks.start_soon(service.sweep_periodically)
        runner = web.AppRunner(
            make_app(service, checkpoints, api_key),
            access_log=None,
            shutdown_timeout=1.0,
            keepalive_timeout=_KEEP_ALIVE_SECONDS,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, listener, backlog=1024).start()
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            # Cancel the work first: its promises fail, which ends the clients' open polls.
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await runner.cleanup()
                await service.keep_records()


def make_app(service: Service, checkpoints: CheckpointStore, api_key: str) -> web.Application:
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[as_json, key_check(api_key)])
    rooms = (
        service,
        service.sessions,
        External(service.backend, checkpoints, service.records),
        Listings(service.records, service.sessions, service.training, checkpoints),
    )
    for room in rooms:
        for route, handler in room.routes().items():
            method, path = route.split()
            for each in (method, "HEAD") if method == "GET" else (method,):
                app.router.add_route(each, f"{API}/{path}", handler)
    return app


class Service:
    """HTTP handlers: parse requests, dispatch them, answer with promises."""

    def __init__(self, backend: Backend, checkpoints: CheckpointStore, jobs: Jobs, options: ServiceOptions) -> None:
        self.backend = backend
        self.options = options
        self.records = RecordStore(checkpoints.folder)
        self.sessions = Sessions(self.records)
        self.promises = jobs.promises
        self.promises.grace = options.result_grace
        self._checkpoints = checkpoints
        self._sequences = SequenceStore(life=options.sequence_life, most_bytes=options.sequence_bytes)
        self.training = Training(
            backend, checkpoints, jobs, self._sequences, self.records, gap_patience=options.gap_patience
        )
        self.sampling = Sampling(
            backend,
            checkpoints,
            jobs,
            self._sequences,
            max_snapshots=options.max_snapshots,
            max_samples=options.max_samples,
        )

    def routes(self) -> dict[str, Handler]:
        return {
            "GET healthz": self.healthz,
            "POST client/config": self.client_config,
            "POST client/dynamic_config": self.client_dynamic_config,
            "POST telemetry": self.telemetry,
            "GET get_server_capabilities": self.get_server_capabilities,
            "POST create_session": self.create_session,
            "POST session_heartbeat": self.session_heartbeat,
            "POST sessions/{session}/finish": self.finish_session,
            "POST create_model": self.create_model,
            "POST get_info": self.get_info,
            "POST forward_backward": self.forward_backward,
            "POST forward": self.forward_backward,
            "POST optim_step": self.optim_step,
            "POST save_weights": functools.partial(self.save, "weights"),
            "POST save_weights_for_sampler": functools.partial(self.save, "sampler_weights"),
            "POST save_weights_external": functools.partial(self.save, "external_weights"),
            "POST load_weights": self.load_weights,
            "POST create_sampling_session": self.create_sampling_session,
            "GET samplers/{sampler}": self.get_sampler,
            "POST asample": self.asample,
            "POST retrieve_future": self.retrieve_future,
            "POST retrieve_futures": self.retrieve_futures,
            "POST cancel_future": self.cancel_future,
        }

    async def sweep_periodically(self) -> None:
        """Periodically drops old results, expired checkpoints and sequences, idle sessions, and requests stuck behind gaps."""
        next_checkpoint_sweep = 0.0
        while True:
            now = time.monotonic()
            self.promises.sweep(now)
            self._sequences.sweep(now)
            self.training.give_up_gaps(now)
            for session in list(self.sessions.known.values()):
                if not session.finished and now - session.heartbeat_at > self.options.session_idle:
                    logger.info("session %s has sent no heartbeat for %.0f s", session.id, now - session.heartbeat_at)
                    self._end(session)
            if now >= next_checkpoint_sweep:
                next_checkpoint_sweep = now + 60
                try:
                    await anyio.to_thread.run_sync(self._checkpoints.sweep, time.time())
                except OSError:
                    logger.warning("cannot sweep expired checkpoints", exc_info=True)
                await self.keep_records()
            await anyio.sleep(min(_SWEEP_SECONDS, self.options.gap_patience / 4))

    async def keep_records(self) -> None:
        """Writes the records of open sessions and runs."""
        self.sessions.note()
        self.training.note()
        await self.records.flush()

    # -- service and sessions ------------------------------------------------------------------------------------

    async def healthz(self, request: web.Request) -> dict[str, Any]:
        return {"status": "ok"}

    async def client_config(self, request: web.Request) -> web.Response:
        response = json_response(200, sample_use_retrieve_futures=self.options.shared_polls)
        # The SDK asks once, over a connection that it never closes.
        response.force_close()
        return response

    async def client_dynamic_config(self, request: web.Request) -> dict[str, Any]:
        return {"sample_cancel_enabled": True}

    async def telemetry(self, request: web.Request) -> dict[str, Any]:
        await request.read()
        return {"status": "accepted"}

    async def get_server_capabilities(self, request: web.Request) -> dict[str, Any]:
        able = {"max_context_length": self.backend.max_context_length, "trainable": True, "sampleable": True}
        names = self.options.listed or (self.backend.model_name,)
        return {"supported_models": [{"model_name": name, **able} for name in names]}

    async def create_session(self, request: web.Request) -> dict[str, Any]:
        session = self.sessions.open((await body_of(request)).fields)
        await self.records.flush()
        return {"session_id": session.id, "type": "create_session"}

    async def session_heartbeat(self, request: web.Request) -> dict[str, Any]:
        self.sessions.get((await body_of(request)).text("session_id")).heartbeat_at = time.monotonic()
        return {"type": "session_heartbeat"}

    async def finish_session(self, request: web.Request) -> None:
        session = self.sessions.known.get(request.match_info["session"])
        if session is None:
            raise NotFound(f"no session {request.match_info['session']!r}")
        await body_of(request)
        self._end(session)
        await self.records.flush()

    def _end(self, session: Session) -> None:
        if session.finished:
            return
        session.finished = True
        self.sampling.cancel_session(session.id, time.monotonic())
        for id in session.record.run_ids:
            model = self.training.models.get(id)
            if model is not None:
                self.training.remove(model, "its session has ended")
        self.sampling.close(session.id, set(session.record.run_ids))
        self._sequences.forget(session.id)
        self.records.note(session.record)

    # -- training ------------------------------------------------------------------------------------------------

    async def create_model(self, request: web.Request) -> dict[str, Any]:
        return self._open_model(await body_of(request), self.training.create)

    def _open_model(self, body: Body, create: Callable[[str, int, Mapping[str, Any]], Promise]) -> dict[str, Any]:
        session = self.sessions.get(body.text("session_id"))
        number = body.number("model_seq_id")
        promise = create(session.id, number, body.fields)
        id = model_id(session.id, number)
        session.add_run(id)
        self.records.note(session.record)
        return {"request_id": promise.request_id, "model_id": id}

    async def get_info(self, request: web.Request) -> dict[str, Any]:
        model = self._model((await body_of(request)).text("model_id"))
        name = self.backend.model_name
        data = {"arch": None, "model_name": name, "tokenizer_id": self.backend.tokenizer_path or None}
        return {
            "type": "get_info",
            "model_id": model.id,
            "model_data": data,
            "is_lora": True,
            "lora_rank": model.lora.rank,
            "model_name": name,
        }

    def _model(self, id: str) -> Model:
        model = self.training.models.get(id)
        if model is None:
            raise NotFound(f"no model {id!r}: its session has ended, or the service was restarted")
        return model

    def _submit(self, model: Model, seq_id: int | None, begin: Any) -> dict[str, Any]:
        promise = self.training.submit(model, seq_id, begin)
        return {"request_id": promise.request_id, "model_id": model.id}

    async def forward_backward(self, request: web.Request) -> dict[str, Any]:
        body = await request.read()
        message = await offload(len(body), protocol.parse_forward_backward, body)
        model = self._model(message.model_id)
        if request.path.endswith("/forward"):
            message.forward_only = True
        begin = functools.partial(self.training.forward_backward, message, len(body))
        return self._submit(model, message.seq_id or None, begin)

    async def optim_step(self, request: web.Request) -> dict[str, Any]:
        body = await body_of(request)
        begin = functools.partial(self.training.optim_step, body.fields)
        return self._submit(self._model(body.text("model_id")), body.optional_number("seq_id"), begin)

    async def save(self, kind: Kind, request: web.Request) -> dict[str, Any]:
        body = await body_of(request)
        model, seq_id = self._model(body.text("model_id")), body.optional_number("seq_id")
        if kind == "sampler_weights" and body.fields.get("path") is None:
            return self._submit(model, seq_id, self._begin_snapshot(model, body))
        return self._submit(model, seq_id, functools.partial(self.training.save, kind, body.fields, seq_id))

    def _begin_snapshot(self, model: Model, body: Body) -> Any:
        session = self.sessions.get(model.session_id)
        number = body.number("sampling_session_seq_id")
        kind = str(body.fields.get("kind") or "snapshot")

        def publish(model: Model, snapshot: Snapshot) -> str:
            if kind not in ("snapshot", "inflight"):
                raise UserFault(f"kind: must be snapshot or inflight, not {kind!r:.80}")
            if session.finished:
                raise UserFault("the session has ended")
            id = sampler_id(session.id, number)
            session.add_sampler(id, None)
            return self.sampling.publish(id, session.id, model.id, kind, snapshot)

        return functools.partial(self.training.snapshot, publish)

    async def load_weights(self, request: web.Request) -> dict[str, Any]:
        body = await body_of(request)
        if body.fields.get("model_id") is None:
            return self._open_model(body, self.training.create_from_checkpoint)
        begin = functools.partial(self.training.load, body.fields)
        return self._submit(self._model(body.text("model_id")), body.optional_number("seq_id"), begin)

    # -- sampling ------------------------------------------------------------------------------------------------

    async def create_sampling_session(self, request: web.Request) -> dict[str, Any]:
        body = await body_of(request)
        session = self.sessions.get(body.text("session_id"))
        sampler = await self.sampling.create(session.id, body.number("sampling_session_seq_id"), body.fields)
        session.add_sampler(sampler.id, sampler.model_path)
        return {"sampling_session_id": sampler.id, "type": "create_sampling_session"}

    async def get_sampler(self, request: web.Request) -> dict[str, Any]:
        id = request.match_info["sampler"]
        sampler = self.sampling.samplers.get(id)
        path = self.sessions.sampler(id) if sampler is None else sampler.model_path
        return {"sampler_id": id, "base_model": self.backend.model_name, "model_path": path}

    async def asample(self, request: web.Request) -> dict[str, Any]:
        raw = await request.read()
        body = await offload(len(raw), Body.parse, raw)
        seq_id = body.optional_number("seq_id")
        sampler = None
        if body.fields.get("sampling_session_id") is not None:
            sampler = self.sampling.find(body.text("sampling_session_id"))
        promise = self.sampling.submit(sampler, seq_id, body.fields, len(raw))
        count = body.fields.get("num_samples")
        count = count if isinstance(count, int) and 1 <= count <= MAX_SAMPLES else 1
        ids = [sequence_id(promise.request_id, index) for index in range(count)]
        return {"request_id": promise.request_id, "sample_sequence_ids": ids}

    # -- results -------------------------------------------------------------------------------------------------

    async def retrieve_future(self, request: web.Request) -> web.Response | dict[str, Any]:
        """Waits up to ``options.poll`` seconds for a result."""
        body = await body_of(request)
        promise = self.promises.get(body.text("request_id"))
        outcome = await self.promises.wait(promise, self.options.poll)
        if outcome is None:
            return json_response(408, type="try_again", request_id=promise.request_id, queue_state="active")
        if isinstance(outcome, Failure):
            self.promises.fetched(promise, time.monotonic())
            return {"error": outcome.error, "category": outcome.category}
        if body.fields.get("allow_metadata_only") is True and len(outcome.body) > _ANNOUNCED_BYTES:
            return {"status": "complete_metadata", "response_payload_size": len(outcome.body)}
        self.promises.fetched(promise, time.monotonic())
        return web.Response(body=outcome.body, content_type=outcome.content_type)

    async def retrieve_futures(self, request: web.Request) -> dict[str, Any]:
        """Waits for samples of one sampling client to complete; their results are then fetched by ``retrieve_future``."""
        body = await body_of(request)
        target = body.object("target")
        sampler = self.sampling.find(target.text("sampling_session_id"))
        listener = (sampler.id, target.optional_number("cloned_sampler_id") or 0)
        self.promises.release(map(str, optional(body.fields, "retrieved_request_ids", list, [])))
        seconds = min(self.options.poll, optional(body.fields, "timeout", float, self.options.poll))
        cursor = body.optional_number("prev_cursor") or 0
        done, cursor = await self.promises.completions(listener, cursor, seconds)
        return {"completions": [_completion(promise) for promise in done], "cursor": cursor}

    async def cancel_future(self, request: web.Request) -> None:
        """Cancels a sample. Training requests cannot be cancelled, since later ones depend on them."""
        promise = self.promises.get((await body_of(request)).text("request_id"))
        self.promises.cancel(promise, time.monotonic())


def _completion(promise: Promise) -> dict[str, Any]:
    if isinstance(promise.outcome, Reply):
        size = len(promise.outcome.body)
        return {"state": "finished", "request_id": promise.request_id, "response_payload_uncompressed_size": size}
    return {"state": "failed", "request_id": promise.request_id}
