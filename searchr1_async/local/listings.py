"""Routes to list training runs and to list and change checkpoints."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import anyio.to_thread
from aiohttp import web

from searchr1_async.local.answers import NotFound, json_answer, page_of, texts, timestamp
from searchr1_async.local.backend import UserFault
from searchr1_async.local.checkpoints import Checkpoint, CheckpointId, CheckpointStore, Kind
from searchr1_async.local.protocol import Body
from searchr1_async.local.records import RecordStore, RunRecord
from searchr1_async.local.sessions import OWNER, Sessions
from searchr1_async.local.training import Training, model_id

_SHORTEST_TTL, _LONGEST_TTL = 3600, 10 * 366 * 86400
"""Bounds of a ``ttl_seconds``: an hour and ten years."""

_TYPES: dict[Kind, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""The protocol's names of the checkpoint kinds in listings."""
_LAST = {"weights": "last_checkpoint", "sampler_weights": "last_sampler_checkpoint"}
"""A run's field for its newest checkpoint of a kind; the protocol has none for external weights."""


class Listings:
    """The run and checkpoint routes of ``tinker.RestClient``."""

    def __init__(
        self, records: RecordStore, sessions: Sessions, training: Training, checkpoints: CheckpointStore
    ) -> None:
        self._records = records
        self._sessions = sessions
        self._training = training
        self._checkpoints = checkpoints
        self._copies: dict[str, str] = {}

    def add_routes(self, app: web.Application, prefix: str) -> None:
        run = f"{prefix}/training_runs/{{run}}"
        checkpoint = f"{run}/checkpoints/{{kind}}/{{name}}"
        app.router.add_get(f"{prefix}/training_runs", self.list_runs)
        app.router.add_get(run, self.get_run)
        app.router.add_get(f"{run}/checkpoints", self.list_checkpoints_of_run)
        app.router.add_get(f"{prefix}/checkpoints", self.list_checkpoints)
        app.router.add_delete(checkpoint, self.delete_checkpoint)
        app.router.add_put(f"{checkpoint}/ttl", self.set_ttl)
        app.router.add_post(f"{checkpoint}/publish", functools.partial(self.publish, True))
        app.router.add_delete(f"{checkpoint}/publish", functools.partial(self.publish, False))
        app.router.add_post(f"{prefix}/weights_info", self.weights_info)
        app.router.add_post(f"{prefix}/copy_weights", self.copy_weights)

    async def list_runs(self, request: web.Request) -> web.Response:
        """One page of runs (of one project, with ``project_id``), most recently used first."""
        project = request.query.get("project_id")
        runs = [
            fields
            for fields in await self._runs()
            if project in (None, self._sessions.project_of(fields["training_run_id"].partition(":")[0]))
        ]
        page, cursor = page_of(request, runs)
        return json_answer(training_runs=page, cursor=cursor)

    async def get_run(self, request: web.Request) -> web.Response:
        runs = await self._runs(request.match_info["run"])
        if not runs:
            raise NotFound(f"no training run {request.match_info['run']!r}")
        return json_answer(**runs[0])

    async def list_checkpoints(self, request: web.Request) -> web.Response:
        page, cursor = page_of(request, await self._newest_first(), limit=100)
        return json_answer(checkpoints=page, cursor=cursor)

    async def list_checkpoints_of_run(self, request: web.Request) -> web.Response:
        """All checkpoints of a run, newest first, without pagination."""
        return json_answer(checkpoints=await self._newest_first(request.match_info["run"]))

    async def delete_checkpoint(self, request: web.Request) -> web.Response:
        await anyio.to_thread.run_sync(self._checkpoints.delete, _id(request), time.time())
        return web.Response(status=204)

    async def set_ttl(self, request: web.Request) -> web.Response:
        now = time.time()
        expires_at = _expiry(Body.parse(await request.read()), now)
        await anyio.to_thread.run_sync(self._checkpoints.set_expiry, _id(request), expires_at, now)
        return web.Response(status=204)

    async def publish(self, public: bool, request: web.Request) -> web.Response:
        """Publishes or unpublishes. Idempotent: the SDK would retry a 409 for five minutes."""
        await anyio.to_thread.run_sync(self._checkpoints.set_public, _id(request), public, time.time())
        return web.Response(status=204)

    async def weights_info(self, request: web.Request) -> web.Response:
        id = CheckpointId.parse(Body.parse(await request.read()).text("tinker_path"))
        checkpoint = await anyio.to_thread.run_sync(self._checkpoints.find, id, time.time())
        return json_answer(
            base_model=checkpoint.base_model, is_lora=True, lora_rank=checkpoint.lora.rank, **_parts(checkpoint)
        )

    async def copy_weights(self, request: web.Request) -> web.Response:
        """Copies a checkpoint into its own, already ended session. Idempotent by ``X-Idempotency-Key``."""
        body, now = Body.parse(await request.read()), time.time()
        source, project = CheckpointId.parse(body.text("source_path")), body.text("destination_project_id")
        key = request.headers.get("X-Idempotency-Key") or secrets.token_hex(8)
        if key not in self._copies:
            expires_at = _expiry(body, now)
            session = secrets.token_hex(8)
            to = replace(source, run=model_id(session, 0))
            copied = await anyio.to_thread.run_sync(self._checkpoints.copy, source, to, expires_at, now)
            self._sessions.add_ended(session, f"copy of {source.path}"[:200], project, to.run)
            self._records.note(RunRecord(to.run, copied.base_model, copied.lora.rank, now, copied.user_metadata))
            await self._records.flush()
            self._copies[key] = to.path
        return json_answer(tinker_path=self._copies[key])

    async def _newest_first(self, run: str | None = None) -> list[dict[str, Any]]:
        return [_fields(checkpoint) for checkpoint in reversed(await self._listing(run))]

    async def _listing(self, run: str | None = None) -> list[Checkpoint]:
        return await anyio.to_thread.run_sync(functools.partial(self._checkpoints.listing, time.time(), run))

    async def _runs(self, run: str | None = None) -> list[dict[str, Any]]:
        """All recorded runs, and those with only checkpoints left, most recently used first."""
        self._training.note()
        listing = await self._listing(run)
        runs = {record.id: _run(record) for record in self._records.runs.values() if run in (None, record.id)}
        recorded = set(runs)
        for checkpoint in listing:
            id = checkpoint.id.run
            if id not in recorded:
                record = RunRecord(id, checkpoint.base_model, checkpoint.lora.rank, checkpoint.created_at)
                runs[id] = {**runs.get(id, {}), **_run(record)}
            if checkpoint.id.kind in _LAST:
                runs[id][_LAST[checkpoint.id.kind]] = _fields(checkpoint)
        return sorted(
            runs.values(), key=lambda fields: datetime.fromisoformat(fields["last_request_time"]), reverse=True
        )


def _run(record: RunRecord) -> dict[str, Any]:
    return {
        "training_run_id": record.id,
        "base_model": record.base_model,
        "model_owner": OWNER,
        "is_lora": True,
        "lora_rank": record.lora_rank,
        "last_request_time": timestamp(record.last_request_at),
        "user_metadata": texts(record.user_metadata),
    }


def _fields(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{checkpoint.id.kind}/{checkpoint.id.name}",
        "checkpoint_type": _TYPES[checkpoint.id.kind],
        "time": timestamp(checkpoint.created_at),
        "tinker_path": checkpoint.id.path,
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": texts(checkpoint.user_metadata),
        "expires_at": None if checkpoint.expires_at is None else timestamp(checkpoint.expires_at),
    }


def _expiry(body: Body, now: float) -> float | None:
    """Expiry time from ``ttl_seconds``; None: never. Raises :class:`UserFault` if out of range."""
    ttl = body.optional_number("ttl_seconds")
    if ttl is None:
        return None
    if not _SHORTEST_TTL <= ttl <= _LONGEST_TTL:
        raise UserFault(f"ttl_seconds: must be between {_SHORTEST_TTL} (an hour) and ten years, got {ttl}")
    return now + ttl


def _parts(checkpoint: Checkpoint) -> Mapping[str, bool]:
    lora = checkpoint.lora
    return {"train_unembed": lora.train_unembed, "train_mlp": lora.train_mlp, "train_attn": lora.train_attn}


def _id(request: web.Request) -> CheckpointId:
    return CheckpointId.of(request.match_info["run"], request.match_info["kind"], request.match_info["name"])
