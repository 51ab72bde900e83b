"""Sampling clients: which weights each one uses, which weights stay in memory; and the routes to poll, fetch and cancel results."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
from aiohttp import web

from searchr1_async.local import protocol
from searchr1_async.local.backend import Backend, InflightClient, Snapshot, UserFault
from searchr1_async.local.checkpoint_files import CheckpointId, CheckpointStore
from searchr1_async.local.promises import CompletionLog, Failure, Promise, PromiseStore, Reply, UnknownPromise
from searchr1_async.local.protocol import Body
from searchr1_async.local.provenance import SequenceStore
from searchr1_async.local.responses import Gone, Jobs, NotFound, TooManySamples, json_answer, offload, result_of
from searchr1_async.local.sessions import Sessions

CLONE_NUMBERS = 1_000_000_000
"""A cloned sampling client numbers its requests from its clone id times this."""
_ANNOUNCED_BYTES = 1 << 20
"""Larger results are announced first, so that the client can limit concurrent downloads."""


@dataclass(slots=True, eq=False)
class Weights:
    """A sampler's weights, shared by all samplers of one checkpoint and by all in-flight samplers of one model.

    Every in-flight save replaces ``snapshot`` (see :class:`~searchr1_async.local.backend.InflightTarget`).
    """

    snapshot: Snapshot | None
    """None: not in memory."""
    origin: tuple[CheckpointId, float] | None = None
    """Source checkpoint and its creation time; None: never on disk."""
    running: int = 0


@dataclass(frozen=True, slots=True)
class Sampler:
    id: str
    session_id: str
    weights: Weights | None
    """None: the base model."""
    model_path: str | None = None
    inflight: InflightClient | None = None
    """An in-flight sampler's own prefix cache namespace over the shared weights."""


def sampler_id(session_id: str, sampling_session_seq_id: int) -> str:
    return f"{session_id}:sample:{sampling_session_seq_id}"


class Sampling:
    """All samplers, with an LRU of at most ``max_snapshots`` adapter snapshots in memory.

    Evicted weights are reloaded from their checkpoint; a sampler whose weights have no checkpoint then fails. In-flight
    weights (one per model) do not count and stay until their session ends.
    """

    def __init__(
        self,
        backend: Backend,
        checkpoints: CheckpointStore,
        jobs: Jobs,
        sequences: SequenceStore,
        *,
        max_snapshots: int,
        max_samples: int,
    ) -> None:
        self._backend = backend
        self._checkpoints = checkpoints
        self._jobs = jobs
        self._sequences = sequences
        self._max_snapshots = max_snapshots
        self._max_samples = max_samples
        self._open_samples = 0
        self._resident: OrderedDict[Weights, None] = OrderedDict()
        self._by_checkpoint: dict[tuple[CheckpointId, float], Weights] = {}
        self._inflight: dict[str, Weights] = {}
        self._reading = anyio.Lock()
        self._logs: dict[tuple[str, int], CompletionLog] = {}
        self._clones = itertools.count(1)
        self.samplers: dict[str, Sampler] = {}

    # -- samplers ------------------------------------------------------------------------------------------------

    async def create(self, session_id: str, number: int, fields: Mapping[str, Any]) -> Sampler:
        """``create_sampling_session``, idempotent by ``number``. Raises :class:`UserFault` for an unknown model or checkpoint."""
        id = sampler_id(session_id, number)
        if id not in self.samplers:
            weights, path = await self._weights_for(fields)
            self.samplers[id] = Sampler(id, session_id, weights, path)
        return self.samplers[id]

    def publish(self, id: str, session_id: str, model_id: str, kind: str, snapshot: Snapshot) -> str:
        """Creates a sampler over in-memory weights; returns its id.

        With ``kind`` "inflight" all in-flight samplers of the model switch to these weights, running samples included; the
        new sampler gets its own prefix cache. Saves of a model must be published in order.
        """
        if kind == "inflight":
            weights = self._inflight.setdefault(model_id, Weights(None))
            weights.snapshot = snapshot
            self.samplers[id] = Sampler(id, session_id, weights, inflight=InflightClient(weights))
        else:
            weights = Weights(snapshot)
            self.samplers[id] = Sampler(id, session_id, weights)
            self._use(weights)
        return id

    def close(self, session_id: str, model_ids: set[str]) -> None:
        """Drops a session's samplers and the weights that only they used."""
        for id in [sampler.id for sampler in self.samplers.values() if sampler.session_id == session_id]:
            del self.samplers[id]
        self._logs = {key: log for key, log in self._logs.items() if key[0] in self.samplers}
        for id in model_ids:
            self._inflight.pop(id, None)
        used = {sampler.weights for sampler in self.samplers.values()}
        # Only dereferenced, not cleared: the backend may be in the middle of a step with them.
        for weights in [weights for weights in self._resident if weights not in used]:
            del self._resident[weights]
        self._by_checkpoint = {key: weights for key, weights in self._by_checkpoint.items() if weights in used}

    def find(self, id: str) -> Sampler:
        """Raises :class:`NotFound`."""
        sampler = self.samplers.get(id)
        if sampler is None:
            raise NotFound(f"no sampler {id!r}: its session has ended, or the service was restarted")
        return sampler

    async def _weights_for(self, fields: Mapping[str, Any]) -> tuple[Weights | None, str | None]:
        path = protocol.optional(fields, "model_path", str, "")
        if path:
            return await self._read(CheckpointId.parse(path)), path
        name = fields.get("base_model")
        if name != self._backend.model_name:
            raise UserFault(f"unknown base model {name!r:.200}: this service only has {self._backend.model_name!r}")
        return None, None

    async def _read(self, id: CheckpointId) -> Weights:
        """A checkpoint's weights, from memory if loaded."""
        async with self._reading:
            checkpoint = await anyio.to_thread.run_sync(self._checkpoints.find, id, time.time())
            if checkpoint.base_model != self._backend.model_name:
                raise UserFault(
                    f"{id.path} belongs to {checkpoint.base_model!r}; this service has {self._backend.model_name!r}"
                )
            key = (id, checkpoint.created_at)
            weights = self._by_checkpoint.setdefault(key, Weights(None, key))
            if weights.snapshot is None:
                _, state = await anyio.to_thread.run_sync(self._checkpoints.load, id, time.time())
                weights.snapshot = await result_of(self._backend.import_snapshot(checkpoint.lora, state))
            self._use(weights)
            return weights

    def _use(self, weights: Weights) -> None:
        """Marks weights as just used and evicts beyond the limit."""
        self._resident[weights] = None
        self._resident.move_to_end(weights)
        excess = max(0, len(self._resident) - self._max_snapshots)
        idle = [other for other in self._resident if other.running == 0 and other is not weights]
        for other in idle[:excess]:
            del self._resident[other]
            other.snapshot = None

    # -- samples -------------------------------------------------------------------------------------------------

    def submit(self, sampler: Sampler | None, seq_id: int | None, fields: Mapping[str, Any], size: int) -> Promise:
        """``asample``, idempotent by sampler and ``seq_id``; ``size`` is the body's size in bytes.

        ``sampler`` is None when the request names a model (``base_model`` or ``model_path``). Raises :class:`TooManySamples`.
        """
        owner = sampler.id if sampler is not None else "-"
        key = None if sampler is None or seq_id is None else (owner, seq_id)
        earlier = self._jobs.promises.find(key)
        if earlier is not None:
            return earlier
        if self._open_samples >= self._max_samples:
            raise TooManySamples
        promise = self._jobs.promises.open("Sample", owner, key)
        if sampler is not None and seq_id is not None:
            promise.log = self.log_of(sampler, seq_id // CLONE_NUMBERS)
        self._open_samples += 1
        cancelled = anyio.CancelScope()
        promise.on_cancel = cancelled.cancel
        self._jobs.start_loop(self._sample, promise, cancelled, sampler, fields, size)
        return promise

    def log_of(self, sampler: Sampler, clone: int) -> CompletionLog:
        """Settled requests of one client (clone) of a sampler."""
        return self._logs.setdefault((sampler.id, clone), CompletionLog())

    def join(self) -> int:
        """A new clone number; the original client is 0."""
        return next(self._clones)

    async def _sample(
        self,
        promise: Promise,
        cancelled: anyio.CancelScope,
        sampler: Sampler | None,
        fields: Mapping[str, Any],
        size: int,
    ) -> None:
        async def work() -> Reply:
            call = await offload(size, protocol.decode_sample, fields)
            if call.record and sampler is None:
                raise UserFault(
                    "record_stability_info: sample through a sampling session; only its sequences are recorded"
                )
            weights = await self._current(sampler, fields)
            if weights is None:
                result = await result_of(self._backend.sample(None, call.request))
            else:
                weights.running += 1
                try:
                    source = weights.snapshot if sampler is None else sampler.inflight or weights.snapshot
                    result = await result_of(self._backend.sample(source, call.request))
                finally:
                    weights.running -= 1
            # If the sampler is gone, its session has ended meanwhile.
            if call.record and sampler is not None and sampler.id in self.samplers:
                self._sequences.record(
                    sampler.session_id, promise.request_id, call.request.prompt, result.sequences, time.monotonic()
                )
            tokens = sum(len(sequence.tokens) for sequence in result.sequences)
            return await offload(8 * tokens, protocol.encode_sample, result, call.prompt_logprobs_last_n)

        try:
            with cancelled:
                await self._jobs.run(promise, work)
        finally:
            self._open_samples -= 1

    async def _current(self, sampler: Sampler | None, fields: Mapping[str, Any]) -> Weights | None:
        """A sampler's weights, reloaded if evicted. Raises :class:`UserFault`."""
        if sampler is None:
            weights, _ = await self._weights_for(fields)
            return weights
        weights = sampler.weights
        if weights is None:
            return None
        if weights.snapshot is None and weights.origin is not None:
            id, _ = weights.origin
            if await self._read(id) is not weights:
                raise UserFault(
                    f"{id.path} was overwritten after sampler {sampler.id} was created: create a new sampler"
                )
        if weights.snapshot is None:
            raise UserFault(
                f"the weights of sampler {sampler.id} were evicted: only the {self._max_snapshots} most recently "
                "used stay in memory; to keep weights longer, save them with save_weights_for_sampler(name=...)"
            )
        if sampler.inflight is None:
            self._use(weights)
        return weights

    def cancel_session(self, session_id: str, now: float) -> None:
        for sampler in [sampler for sampler in self.samplers.values() if sampler.session_id == session_id]:
            for promise in self._jobs.promises.open_of(sampler.id):
                self._jobs.promises.cancel(promise, now, "the session has ended")


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
