"""What the protocol lets clients list and change apart from training: sessions, training runs and their checkpoints."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import anyio.to_thread
from aiohttp import web

from searchr1_async.local.answers import json_answer
from searchr1_async.local.checkpoints import Checkpoint, CheckpointId, CheckpointStore, checkpoint_fields
from searchr1_async.local.protocol import Body, MalformedRequest
from searchr1_async.local.training import Training


@dataclass(slots=True)
class Session:
    """One ``ServiceClient``. ``heartbeat_at`` is monotonic time in seconds."""

    id: str
    user_metadata: Mapping[str, Any] | None
    display_name: str | None
    heartbeat_at: float
    model_ids: list[str] = field(default_factory=list)
    sampler_ids: list[str] = field(default_factory=list)
    finished: bool = False


class Listings:
    """The routes of ``tinker.RestClient`` that make sense on one machine."""

    def __init__(self, sessions: Mapping[str, Session], training: Training, checkpoints: CheckpointStore) -> None:
        self._sessions = sessions
        self._training = training
        self._checkpoints = checkpoints

    def add_routes(self, app: web.Application, prefix: str) -> None:
        run = f"{prefix}/training_runs/{{run}}"
        checkpoint = f"{run}/checkpoints/{{kind}}/{{name}}"
        app.router.add_get(f"{prefix}/sessions", self.list_sessions)
        app.router.add_get(f"{prefix}/sessions/{{session}}", self.get_session)
        app.router.add_get(f"{prefix}/training_runs", self.list_runs)
        app.router.add_get(run, self.get_run)
        app.router.add_get(f"{run}/checkpoints", self.list_checkpoints)
        app.router.add_get(f"{prefix}/checkpoints", self.list_checkpoints)
        app.router.add_delete(checkpoint, self.delete_checkpoint)
        app.router.add_put(f"{checkpoint}/ttl", self.set_ttl)
        app.router.add_post(f"{prefix}/weights_info", self.weights_info)

    async def list_sessions(self, request: web.Request) -> web.Response:
        page, _ = _page(request, [session.id for session in self._sessions.values() if not session.finished])
        return json_answer(sessions=page)

    async def get_session(self, request: web.Request) -> web.Response:
        session = self._sessions.get(request.match_info["session"])
        if session is None:
            return json_answer(404, detail=f"no session {request.match_info['session']!r}")
        return json_answer(
            training_run_ids=session.model_ids,
            sampler_ids=session.sampler_ids,
            user_metadata=session.user_metadata,
            display_name=session.display_name,
        )

    async def list_runs(self, request: web.Request) -> web.Response:
        page, cursor = _page(request, await self._runs())
        return json_answer(training_runs=page, cursor=cursor)

    async def get_run(self, request: web.Request) -> web.Response:
        runs = await self._runs(request.match_info["run"])
        if not runs:
            return json_answer(404, detail=f"no training run {request.match_info['run']!r}")
        return json_answer(**runs[0])

    async def list_checkpoints(self, request: web.Request) -> web.Response:
        listing = await self._listing(request.match_info.get("run"))
        page, cursor = _page(request, [checkpoint_fields(checkpoint) for checkpoint in listing], limit=1000)
        return json_answer(checkpoints=page, cursor=cursor)

    async def delete_checkpoint(self, request: web.Request) -> web.Response:
        await anyio.to_thread.run_sync(self._checkpoints.delete, _id(request), time.time())
        return web.Response(status=204)

    async def set_ttl(self, request: web.Request) -> web.Response:
        ttl = Body.parse(await request.read()).optional_number("ttl_seconds")
        now = time.time()
        expires_at = None if ttl is None else now + ttl
        await anyio.to_thread.run_sync(self._checkpoints.set_expiry, _id(request), expires_at, now)
        return web.Response(status=204)

    async def weights_info(self, request: web.Request) -> web.Response:
        id = CheckpointId.parse(Body.parse(await request.read()).text("tinker_path"))
        checkpoint = await anyio.to_thread.run_sync(self._checkpoints.find, id, time.time())
        return json_answer(
            base_model=checkpoint.base_model, is_lora=True, lora_rank=checkpoint.lora.rank, **_parts(checkpoint)
        )

    async def _listing(self, run: str | None = None) -> list[Checkpoint]:
        return await anyio.to_thread.run_sync(functools.partial(self._checkpoints.listing, time.time(), run))

    async def _runs(self, run: str | None = None) -> list[dict[str, Any]]:
        """Runs of this process and those of earlier ones that left checkpoints, latest first."""
        runs: dict[str, dict[str, Any]] = {}
        for model in self._training.models.values():
            if run in (None, model.id):
                runs[model.id] = _run(model.id, model.base_model, model.lora.rank, model.last_request_at)
                runs[model.id]["user_metadata"] = model.user_metadata
        for checkpoint in await self._listing(run):
            id = checkpoint.id.run
            fields = runs.setdefault(id, _run(id, checkpoint.base_model, checkpoint.lora.rank, checkpoint.created_at))
            if checkpoint.id.kind in _LAST:
                fields[_LAST[checkpoint.id.kind]] = checkpoint_fields(checkpoint)
        return sorted(runs.values(), key=lambda fields: fields["last_request_time"], reverse=True)


_LAST = {"weights": "last_checkpoint", "sampler_weights": "last_sampler_checkpoint"}
"""Under which field a run shows its newest checkpoint of a kind; the protocol has none for external weights."""


def _run(id: str, base_model: str, rank: int, at: float) -> dict[str, Any]:
    return {
        "training_run_id": id,
        "base_model": base_model,
        "model_owner": "local",
        "is_lora": True,
        "lora_rank": rank,
        "last_request_time": datetime.fromtimestamp(at, UTC).isoformat(),
    }


def _parts(checkpoint: Checkpoint) -> dict[str, bool]:
    lora = checkpoint.lora
    return {"train_unembed": lora.train_unembed, "train_mlp": lora.train_mlp, "train_attn": lora.train_attn}


def _id(request: web.Request) -> CheckpointId:
    return CheckpointId.of(request.match_info["run"], request.match_info["kind"], request.match_info["name"])


def _page(request: web.Request, items: list[Any], limit: int = 20) -> tuple[list[Any], dict[str, int]]:
    """Raises :class:`MalformedRequest` for a limit or offset that is no number."""
    try:
        limit = max(int(request.query.get("limit", limit)), 0)
        offset = max(int(request.query.get("offset", 0)), 0)
    except ValueError:
        raise MalformedRequest("limit and offset must be integers") from None
    return items[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(items)}
