"""Trainable models; each processes its requests in the order of their numbers.

Clients number a model's requests 1, 2, 3, … and may post them out of order: the SDK posts the first chunk of a
``forward_backward`` last.

Each model has one task that passes jobs from its inbox to the backend, which preserves call order per adapter. The task
waits for a result only where the next call depends on it (create and load); other results are awaited in separate tasks,
so the backend always has its next job queued.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import anyio.to_thread

from searchr1_async.local import protocol, provenance
from searchr1_async.local.backend import (
    STABLE_REINFORCE,
    Adapter,
    Backend,
    ForwardBackwardResult,
    LoraConfig,
    Snapshot,
    UserFault,
    find_inputs,
    ratio_metrics,
)
from searchr1_async.local.checkpoint_files import (
    Checkpoint,
    CheckpointId,
    CheckpointStore,
    Kind,
    RecordStore,
    RunRecord,
)
from searchr1_async.local.protocol import ForwardBackwardCall
from searchr1_async.local.provenance import SequenceStore
from searchr1_async.local.replies import Failure, Jobs, Promise, Reply, failure_of, json_reply, offload, result_of

logger = logging.getLogger(__name__)

_SAVE_TYPES: dict[Kind, str] = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}
Item = TypeVar("Item")


class AlreadyTaken(Exception):
    """A number was offered twice, or after it was dropped."""


@dataclass(slots=True)
class NumberedQueue(Generic[Item]):
    """Releases items in number order.

    A number that never arrives must not block its model forever: :meth:`give_up` drops the items behind the gap.
    """

    next_number: int = 1
    patience: float = 120.0
    """Seconds that items wait for a missing number."""
    _waiting: dict[int, Item] = field(default_factory=dict)
    _blocked_since: float | None = None

    def offer(self, number: int | None, item: Item, now: float) -> list[Item]:
        """Adds an item; returns the items that are now ready, in order.

        An item without a number goes after all waiting ones. Raises :class:`AlreadyTaken` for a number already used.
        """
        if number is None:
            number = max(self._waiting, default=self.next_number - 1) + 1
        if number < self.next_number or number in self._waiting:
            raise AlreadyTaken(f"request {number} was already submitted; the next one is {self.next_number}")
        self._waiting[number] = item
        return self._release(now)

    def missing(self) -> range:
        """The numbers missing before the first waiting item; empty when nothing waits."""
        return range(self.next_number, min(self._waiting, default=self.next_number))

    def deadline(self) -> float | None:
        """When :meth:`give_up` will drop the waiting items; None: nothing waits."""
        return None if self._blocked_since is None else self._blocked_since + self.patience

    def give_up(self, now: float) -> tuple[range, list[Item]]:
        """After the deadline, drops all waiting items; returns the missing numbers and the dropped items.

        Running them instead would silently apply an optimizer step without one of its batches.
        """
        deadline = self.deadline()
        if deadline is None or now < deadline:
            return range(0), []
        gap, self.next_number = self.missing(), max(self._waiting) + 1
        return gap, self.drain()

    def drain(self) -> list[Item]:
        """Removes and returns all waiting items, in order."""
        items = [self._waiting[number] for number in sorted(self._waiting)]
        self._waiting.clear()
        self._blocked_since = None
        return items

    def _release(self, now: float) -> list[Item]:
        ready: list[Item] = []
        while self.next_number in self._waiting:
            ready.append(self._waiting.pop(self.next_number))
            self.next_number += 1
        if not self._waiting:
            self._blocked_since = None
        elif ready or self._blocked_since is None:
            self._blocked_since = now
        return ready


@dataclass(slots=True)
class Job:
    promise: Promise
    begin: Callable[[Model, Promise], Awaitable[None]]
    """Submits the work to the backend; returns when the next job may be submitted."""


@dataclass(slots=True, eq=False)
class Model:
    """One training run."""

    id: str
    session_id: str
    base_model: str
    lora: LoraConfig
    user_metadata: Mapping[str, Any] | None
    requests: NumberedQueue[Job]
    adapter: Adapter | None = None
    inbox: asyncio.Queue[Job | None] = field(default_factory=asyncio.Queue)
    last_save: asyncio.Event | None = None
    """Set when the latest save is on disk; a model's saves are written in order, before any later load."""
    last_request_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    gone: str | None = None
    """Why it accepts no more requests."""

    def trained(self) -> Adapter:
        if self.adapter is None:
            raise UserFault(f"model {self.id} has no weights: {self.gone or 'it was never created'}")
        return self.adapter

    def record(self) -> RunRecord:
        return RunRecord(self.id, self.base_model, self.lora.rank, self.last_request_at, self.user_metadata)


def model_id(session_id: str, model_seq_id: int) -> str:
    """Must match the id that the SDK computes when it creates a model from a checkpoint."""
    return f"{session_id}:train:{model_seq_id}"


class Training:
    def __init__(
        self,
        backend: Backend,
        checkpoints: CheckpointStore,
        jobs: Jobs,
        sequences: SequenceStore,
        records: RecordStore,
        *,
        gap_patience: float,
    ) -> None:
        self._backend = backend
        self._checkpoints = checkpoints
        self._jobs = jobs
        self._sequences = sequences
        self._records = records
        self._gap_patience = gap_patience
        self.models: dict[str, Model] = {}

    # -- creating ------------------------------------------------------------------------------------------------

    def create(self, session_id: str, model_seq_id: int, fields: Mapping[str, Any]) -> Promise:
        """``create_model``: an adapter with fresh weights."""

        async def build(model: Model) -> Adapter:
            self._check_base_model(fields.get("base_model"))
            model.lora = protocol.decode_lora(fields)
            return await result_of(self._backend.create_adapter(model.lora))

        return self._open_model(session_id, model_seq_id, fields, {"type": "create_model"}, build)

    def create_from_checkpoint(self, session_id: str, model_seq_id: int, fields: Mapping[str, Any]) -> Promise:
        """``load_weights`` without a model: a new adapter with a checkpoint's weights."""

        async def build(model: Model) -> Adapter:
            protocol.check_optimizer(fields)
            if fields.get("base_model") is not None:
                self._check_base_model(fields["base_model"])
            return await self._import(model, fields)

        answer = {"type": "load_weights", "path": str(fields.get("path"))}
        return self._open_model(session_id, model_seq_id, fields, answer, build)

    def _open_model(
        self,
        session_id: str,
        model_seq_id: int,
        fields: Mapping[str, Any],
        answer: Mapping[str, str],
        build: Callable[[Model], Awaitable[Adapter]],
    ) -> Promise:
        id = model_id(session_id, model_seq_id)
        key = ("model", id)
        earlier = self._jobs.promises.find(key)
        if earlier is not None:
            return earlier
        promise = self._jobs.promises.open(session_id, key)
        if id in self.models:
            self._jobs.settle(promise, Failure(f"model {id} already exists", "user"))
            return promise
        metadata = fields.get("user_metadata")
        model = self.models[id] = Model(
            id=id,
            session_id=session_id,
            base_model=self._backend.model_name,
            lora=LoraConfig(),
            user_metadata=metadata if isinstance(metadata, dict) else None,
            requests=NumberedQueue(patience=self._gap_patience),
        )
        self._jobs.start_loop(self._run_model, model, promise, build, json_reply({"model_id": id, **answer}))
        return promise

    async def _run_model(
        self, model: Model, promise: Promise, build: Callable[[Model], Awaitable[Adapter]], answer: Reply
    ) -> None:
        """A model's task: creates it, then runs its jobs until it is removed."""

        async def create() -> Reply:
            model.adapter = await build(model)
            self._records.note(model.record())
            await self._records.flush()
            return answer

        await self._jobs.run(promise, create)
        if model.adapter is None:
            assert isinstance(promise.outcome, Failure)
            self.remove(model, promise.outcome.error)
        while (job := await model.inbox.get()) is not None:
            try:
                await job.begin(model, job.promise)
            except Exception as error:
                self._jobs.settle(job.promise, failure_of(error))

    def _check_base_model(self, name: Any) -> None:
        if name != self._backend.model_name:
            raise UserFault(f"unknown base model {name!r:.200}: this service only has {self._backend.model_name!r}")

    def note(self) -> None:
        """Updates the records of all models."""
        for model in self.models.values():
            if model.adapter is not None:
                self._records.note(model.record())

    def remove(self, model: Model, reason: str) -> None:
        """Removes a model: waiting requests fail; those already submitted to the backend finish."""
        if model.gone is not None:
            return
        if model.adapter is not None:
            self._records.note(model.record())
        model.gone = reason
        self.models.pop(model.id, None)
        for job in model.requests.drain():
            self._jobs.settle(job.promise, Failure(f"model {model.id} is gone: {reason}", "user"))
        model.inbox.put_nowait(None)

    # -- requests in sequence ------------------------------------------------------------------------------------

    def submit(self, model: Model, seq_id: int | None, begin: Callable[[Model, Promise], Awaitable[None]]) -> Promise:
        """Queues a request in sequence order; idempotent by ``seq_id``."""
        key = None if seq_id is None else (model.id, seq_id)
        earlier = self._jobs.promises.find(key)
        if earlier is not None:
            return earlier
        promise = self._jobs.promises.open(model.id, key)
        model.last_request_at = time.time()
        try:
            ready = model.requests.offer(seq_id, Job(promise, begin), time.monotonic())
        except AlreadyTaken as error:
            self._jobs.settle(promise, Failure(f"{error}, and its result is no longer kept", "user"))
            return promise
        for job in ready:
            model.inbox.put_nowait(job)
        return promise

    def give_up_gaps(self, now: float) -> None:
        """Fails requests that have waited too long for a missing earlier one."""
        for model in self.models.values():
            gap, dropped = model.requests.give_up(now)
            if dropped:
                logger.warning(
                    "model %s: requests %s never arrived; failing the %d waiting for them", model.id, gap, len(dropped)
                )
            for job in dropped:
                message = (
                    f"request {gap.start} of model {model.id} did not arrive within {self._gap_patience:.0f} s, and this "
                    "one comes after it: resubmit, or load the last checkpoint"
                )
                self._jobs.settle(job.promise, Failure(message, "user"))

    async def forward_backward(self, message: Any, size: int, model: Model, promise: Promise) -> None:
        """``message`` is the protobuf request, ``size`` its bytes."""
        call = await offload(size, protocol.decode_forward_backward, message)
        if call.loss_fn == STABLE_REINFORCE:
            ids = {id for each in call.provenance for id in each.ids()}
            recorded = self._sequences.use(model.session_id, ids, time.monotonic())
            why_missing = self._sequences.why_missing()
            data = await offload(size, provenance.check, call.data, call.provenance, recorded, why_missing)
            call = replace(call, data=data)
        future = self._backend.forward_backward(
            model.trained(), call.data, call.loss_fn, call.loss_config, call.forward_only
        )

        async def answer() -> Reply:
            return await offload(size, _encode_with_ratios, call, await result_of(future))

        self._jobs.start(promise, answer)

    async def optim_step(self, fields: Mapping[str, Any], model: Model, promise: Promise) -> None:
        future = self._backend.optim_step(model.trained(), protocol.decode_adam(fields))

        async def answer() -> Reply:
            metrics = protocol.finite_metrics(await result_of(future))
            return json_reply({"metrics": metrics, "type": "optim_step"})

        self._jobs.start(promise, answer)

    async def load(self, fields: Mapping[str, Any], model: Model, promise: Promise) -> None:
        """``load_weights`` into an existing model; later requests see the loaded weights."""

        async def work() -> Reply:
            if model.last_save is not None:
                await model.last_save.wait()
            model.adapter = await self._import(model, fields)
            return json_reply({"path": fields["path"], "model_id": model.id, "type": "load_weights"})

        await self._jobs.run(promise, work)

    async def _import(self, model: Model, fields: Mapping[str, Any]) -> Adapter:
        id = CheckpointId.parse(protocol.optional(fields, "path", str, ""))
        optimizer = protocol.optional(fields, "optimizer", bool, False)
        checkpoint, state = await anyio.to_thread.run_sync(self._checkpoints.load, id, time.time())
        self._check_base_model(checkpoint.base_model)
        if optimizer and not checkpoint.has_optimizer:
            raise UserFault(f"{id.path} has no optimizer state: load it without the optimizer")
        adapter = await result_of(self._backend.import_adapter(checkpoint.lora, state, optimizer))
        model.lora = checkpoint.lora
        return adapter

    # -- saving --------------------------------------------------------------------------------------------------

    async def save(
        self, kind: Kind, fields: Mapping[str, Any], seq_id: int | None, model: Model, promise: Promise
    ) -> None:
        """Saves to disk: ``save_weights``, ``save_weights_external``, or ``save_weights_for_sampler`` with a name."""
        if fields.get("age_encryption_recipients"):
            raise UserFault(
                "the embedded service does not encrypt: call save_weights_external without age_encryption_recipients"
            )
        name = protocol.optional(fields, "path", str, f"{seq_id or 0:06d}")
        id = CheckpointId.of(model.id, kind, name)
        ttl = fields.get("ttl_seconds")
        if ttl is not None and protocol.optional(fields, "ttl_seconds", int, 0) < 1:
            raise UserFault(f"ttl_seconds: must be at least 1, got {ttl}")
        metadata = fields.get("user_metadata")
        now = time.time()
        checkpoint = Checkpoint(
            id=id,
            base_model=model.base_model,
            lora=model.lora,
            has_optimizer=kind == "weights",
            created_at=now,
            expires_at=None if ttl is None else now + ttl,
            size_bytes=0,
            user_metadata=metadata if isinstance(metadata, dict) else None,
        )
        overwrite = protocol.optional(fields, "overwrite", bool, False)
        future = self._backend.export_adapter(model.trained(), checkpoint.has_optimizer)
        previous, written = model.last_save, asyncio.Event()
        model.last_save = written

        async def write() -> Reply:
            try:
                state = await result_of(future)
                if previous is not None:
                    await previous.wait()
                # Not abandoned on shutdown: the writing thread must finish before the process exits.
                write = functools.partial(self._checkpoints.save, checkpoint, state, overwrite=overwrite)
                await anyio.to_thread.run_sync(write)
            finally:
                written.set()
            return json_reply({"path": id.path, "type": _SAVE_TYPES[kind]})

        self._jobs.start(promise, write)

    async def snapshot(self, publish: Callable[[Model, Snapshot], str], model: Model, promise: Promise) -> None:
        """``save_weights_for_sampler`` without a name: ``publish`` receives the weights and returns a sampler id."""
        future = self._backend.snapshot(model.trained())

        async def answer() -> Reply:
            sampler_id = publish(model, await result_of(future))
            return json_reply({"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"})

        self._jobs.start(promise, answer)


def _encode_with_ratios(call: ForwardBackwardCall, result: ForwardBackwardResult) -> Reply:
    _, config = find_inputs(call.loss_fn, call.loss_config)
    ratios = ratio_metrics(call.loss_fn, config, call.data, result.logprobs)
    return protocol.encode_forward_backward(replace(result, metrics={**result.metrics, **ratios}))
