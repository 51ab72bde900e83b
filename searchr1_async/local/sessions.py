"""Client sessions and their samplers: who is connected, which weights each sampler uses, and which stay in memory.

A session is one ``ServiceClient`` of the one user, ``local``. A project is just a name on a session. The id of a session's
training run or sampler starts with the session's own, which has no colon.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import anyio
import anyio.to_thread
from aiohttp import web

from searchr1_async.local import protocol
from searchr1_async.local.backend import Backend, InflightClient, Snapshot, UserFault
from searchr1_async.local.checkpoint_files import (
    DEFAULT_PROJECT,
    CheckpointId,
    CheckpointStore,
    RecordStore,
    SessionRecord,
)
from searchr1_async.local.provenance import SequenceStore
from searchr1_async.local.replies import (
    Gone,
    Handler,
    Jobs,
    NotFound,
    Promise,
    Reply,
    TooManySamples,
    offload,
    page_of,
    result_of,
    texts,
)


@dataclass(slots=True)
class Session:
    """A session of this process. ``heartbeat_at`` is monotonic time in seconds."""

    record: SessionRecord
    heartbeat_at: float
    finished: bool = False

    @property
    def id(self) -> str:
        return self.record.id

    def add_run(self, id: str) -> None:
        if id not in self.record.run_ids:
            self.record = replace(self.record, run_ids=(*self.record.run_ids, id))

    def add_sampler(self, id: str, path: str | None) -> None:
        """``path``: its checkpoint, if any."""
        self.record = replace(self.record, samplers={**(self.record.samplers or {}), id: path})


class Sessions:
    """All sessions: those of this process, and the records of earlier ones."""

    def __init__(self, records: RecordStore) -> None:
        self.known: dict[str, Session] = {}
        """This process's sessions by id, including finished ones."""
        self._records = records

    def routes(self) -> dict[str, Handler]:
        return {"GET sessions": self.list_sessions, "GET sessions/{session}": self.get_session}

    def open(self, fields: Mapping[str, Any]) -> Session:
        """Creates a session from the fields of ``create_session``."""
        metadata, name, project = (fields.get(key) for key in ("user_metadata", "display_name", "project_id"))
        record = SessionRecord(
            # Random: must not collide with ids of earlier processes that used the same checkpoint folder.
            id=secrets.token_hex(8),
            created_at=time.time(),
            user_metadata=metadata if isinstance(metadata, dict) else None,
            display_name=name if isinstance(name, str) else None,
            project_id=project if isinstance(project, str) and project else DEFAULT_PROJECT,
            samplers={},
        )
        session = self.known[record.id] = Session(record, time.monotonic())
        self._records.note(record)
        return session

    def get(self, id: str) -> Session:
        """An open session. Raises :class:`NotFound` if this process does not know it, :class:`Gone` if it has ended."""
        session = self.known.get(id)
        if session is None:
            raise NotFound(f"no session {id!r}: unknown id, or the service was restarted")
        if session.finished:
            raise Gone(f"session {id!r} has ended")
        return session

    def note(self) -> None:
        """Updates the records of open sessions."""
        for session in self.known.values():
            if not session.finished:
                self._records.note(session.record)

    def sampler(self, id: str) -> str | None:
        """The checkpoint path of an ended session's sampler, if it had one. Raises :class:`NotFound`."""
        record = self._records.sessions.get(id.partition(":")[0])
        if record is None or id not in (record.samplers or {}):
            raise NotFound(f"no sampler {id!r}: unknown id")
        return (record.samplers or {})[id]

    def project_of(self, session_id: str) -> str:
        record = self._records.sessions.get(session_id)
        return DEFAULT_PROJECT if record is None else record.project_id

    async def list_sessions(self, request: web.Request) -> dict[str, Any]:
        """One page of session ids, newest first."""
        self.note()
        newest_first = sorted(
            self._records.sessions.values(), key=lambda each: (each.created_at, each.id), reverse=True
        )
        return {"sessions": page_of(request, [record.id for record in newest_first])[0]}

    async def get_session(self, request: web.Request) -> dict[str, Any]:
        self.note()
        record = self._records.sessions.get(request.match_info["session"])
        if record is None:
            raise NotFound(f"no session {request.match_info['session']!r}")
        return {
            "training_run_ids": record.run_ids,
            "sampler_ids": list(record.samplers or {}),
            "user_metadata": texts(record.user_metadata),
            "display_name": record.display_name,
        }


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


def clone_of(seq_id: int) -> int:
    """The copy of a sampling client that sent a request; copies number their requests in blocks of a billion."""
    return seq_id // 1_000_000_000


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
        promise = self._jobs.promises.open(owner, key, None if seq_id is None else (owner, clone_of(seq_id)))
        self._open_samples += 1
        cancelled = anyio.CancelScope()
        promise.on_cancel = cancelled.cancel
        self._jobs.start_loop(self._sample, promise, cancelled, sampler, fields, size)
        return promise

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
