"""Routes of training runs and checkpoints: listings and changes, download as PEFT files, and import from a folder.

``save_weights_external`` stores a checkpoint of kind ``external_weights``: only the adapter's matrices, under PEFT names.
Its files ``adapter_model.safetensors`` and ``adapter_config.json`` are downloaded from signed URLs: an HMAC-SHA256 over
checkpoint, file and expiry time, with a key of this process. Like object store URLs, they need no API key.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio.to_thread
import numpy as np
from aiohttp import web
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from searchr1_async.errors import CheckpointError
from searchr1_async.local.backend import Backend, LoraConfig, State, UserFault
from searchr1_async.local.checkpoint_files import (
    Checkpoint,
    CheckpointId,
    CheckpointStore,
    Kind,
    RecordStore,
    RunRecord,
    SessionRecord,
)
from searchr1_async.local.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    IMPORT_ROUTE,
    LORA_ALPHA,
    adapter_config,
    lora_parts,
    published_name,
)
from searchr1_async.local.protocol import Body, body_of, optional
from searchr1_async.local.replies import API, SIGNED_ROUTE, Handler, NotFound, page_of, result_of, texts, timestamp
from searchr1_async.local.sessions import Sessions
from searchr1_async.local.trainable_models import Training, model_id

URL_SECONDS = 3600
"""Lifetime of a signed URL."""
_SHORTEST_TTL, _LONGEST_TTL = 3600, 10 * 366 * 86400
"""Bounds of a ``ttl_seconds``: an hour and ten years."""
_TYPES: dict[Kind, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""The protocol's names of the checkpoint kinds in listings."""
_LAST = {"weights": "last_checkpoint", "sampler_weights": "last_sampler_checkpoint"}
"""A run's field for its newest checkpoint of a kind; the protocol has none for external weights."""


class External:
    """The routes of external weights. ``backend`` checks that an imported adapter fits its model."""

    def __init__(self, backend: Backend, checkpoints: CheckpointStore, records: RecordStore) -> None:
        self._backend = backend
        self._checkpoints = checkpoints
        self._records = records
        self._secret = secrets.token_bytes(32)

    def routes(self) -> dict[str, Handler]:
        return {
            "GET training_runs/{run}/checkpoints/external_weights/{name}/external_weights_urls": self.list_urls,
            f"GET {SIGNED_ROUTE}": self.download,
            f"POST {IMPORT_ROUTE}": self.import_weights,
        }

    async def list_urls(self, request: web.Request) -> dict[str, Any]:
        """``external_weights_urls``: one signed URL per file, and their expiry time."""
        id = CheckpointId.of(request.match_info["run"], "external_weights", request.match_info["name"])
        await anyio.to_thread.run_sync(self._checkpoints.find, id, time.time())
        expires = int(time.time()) + URL_SECONDS
        urls = {}
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            path = SIGNED_ROUTE.format(run=quote(id.run, safe=""), name=id.name, file=file)
            query = f"expires={expires}&signature={self._sign(id.run, id.name, file, expires)}"
            urls[file] = f"{request.scheme}://{request.host}{API}/{path}?{query}"
        return {"urls": urls, "expires": timestamp(expires)}

    async def download(self, request: web.Request) -> web.StreamResponse:
        """Serves one file of a checkpoint; 403 if the signature is wrong or expired."""
        run, name, file = (request.match_info[part] for part in ("run", "name", "file"))
        try:
            expires = int(request.query.get("expires", ""))
        except ValueError:
            expires = 0
        signature = request.query.get("signature", "").encode("utf-8", "replace")
        if not hmac.compare_digest(signature, self._sign(run, name, file, expires).encode()):
            raise web.HTTPForbidden(reason="the signature of this URL is wrong: request new URLs")
        if time.time() >= expires:
            raise web.HTTPForbidden(reason="this URL has expired: request new URLs")
        id = CheckpointId.of(run, "external_weights", name)
        checkpoint = await anyio.to_thread.run_sync(self._checkpoints.find, id, time.time())
        path = self._checkpoints.file_of(checkpoint)
        if file == ADAPTER_WEIGHTS:
            # Supports Range requests, so that an interrupted download can resume.
            return web.FileResponse(path)
        config = await anyio.to_thread.run_sync(_config_of, checkpoint, path)
        return web.Response(body=json.dumps(config, indent=1).encode(), content_type="application/json")

    def _sign(self, run: str, name: str, file: str, expires: int) -> str:
        # No part can contain a line break: run and name are validated, file is one path segment.
        message = "\n".join((run, name, file, str(expires)))
        return hmac.new(self._secret, message.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    async def import_weights(self, request: web.Request) -> dict[str, Any]:
        """Imports an adapter from this machine as training weights without optimizer state.

        Request fields: ``folder``, and either ``tinker_path`` (a checkpoint in another embedded service's folder, imported
        under the same path) or ``name`` (the folder is a PEFT adapter). Base model, names and shapes are checked before
        anything is stored. The cloud service has no such route.
        """
        body = await body_of(request)
        folder, now = Path(body.text("folder")), time.time()
        source = optional(body.fields, "tinker_path", str, "")
        if source:
            id = CheckpointId.parse(source)
            if id.kind != "weights":
                raise UserFault(
                    f"{source} cannot be imported: only training weights (tinker://RUN/weights/NAME) are supported"
                )
            found = await anyio.to_thread.run_sync(_read_checkpoint, folder, id, now)
            run = await anyio.to_thread.run_sync(_read_run, folder, id)
        else:
            id = CheckpointId.of("imported", "weights", body.text("name"))
            found, run = await anyio.to_thread.run_sync(_read_adapter, folder, id, now), None
        checkpoint, state = found
        if published_name(checkpoint.base_model) != published_name(self._backend.model_name):
            raise UserFault(
                f"the weights in {folder} were trained from {checkpoint.base_model!r}, but this service has "
                f"{self._backend.model_name!r}"
            )
        checkpoint = replace(checkpoint, base_model=self._backend.model_name, created_at=now, expires_at=None)
        # The backend rejects missing matrices and wrong shapes but ignores extra matrices, so those are checked here.
        adapter = await result_of(self._backend.import_adapter(checkpoint.lora, state, False))
        known = await result_of(self._backend.export_adapter(adapter, False))
        if unknown := sorted(set(state) - set(known)):
            raise UserFault(
                f"the weights in {folder} adapt {unknown[0]}, which this model does not have ({len(unknown)} such matrices)"
            )
        await anyio.to_thread.run_sync(lambda: self._checkpoints.save(checkpoint, state, overwrite=True))
        if run is not None:
            self._records.note(run)
            await self._records.flush()
        return {"path": id.path, "lora_rank": checkpoint.lora.rank}


def _config_of(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {checkpoint.id.path} cannot be read: {error}") from error
    return adapter_config(names, base_model=published_name(checkpoint.base_model), rank=checkpoint.lora.rank)


def _read_checkpoint(folder: Path, id: CheckpointId, now: float) -> tuple[Checkpoint, State]:
    """Reads a checkpoint from another embedded service's folder, without optimizer state."""
    if not (folder / "checkpoints").is_dir():
        raise UserFault(f"{folder} is not the folder of an embedded service: it has no checkpoints")
    checkpoint, state = CheckpointStore(folder / "checkpoints").load(id, now)
    weights = {name: array for name, array in state.items() if not name.startswith("optimizer.")}
    return replace(checkpoint, has_optimizer=False), weights


def _read_run(folder: Path, id: CheckpointId) -> RunRecord | None:
    records = RecordStore(folder / "checkpoints")
    records.read()
    return records.runs.get(id.run)


def _read_adapter(folder: Path, id: CheckpointId, now: float) -> tuple[Checkpoint, State]:
    """Reads a PEFT folder as a checkpoint. Raises :class:`UserFault` if it is invalid or not supported."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserFault(f"{folder} is not a readable PEFT adapter: {error}") from None
    rank, alpha = _rank_and_alpha(folder, config)
    parts = {name: lora_parts(name) for name in state}
    if unknown := sorted(name for name, found in parts.items() if found is None):
        raise UserFault(f"{folder}: {unknown[0]} is not a LoRA matrix ({len(unknown)} such names)")
    paths = {found[0] for found in parts.values() if found is not None}
    is_attention = {path: "attn" in path or "attention" in path for path in paths if path != "lm_head"}
    lora = LoraConfig(
        rank=rank,
        train_unembed="lm_head" in paths,
        train_mlp=not all(is_attention.values()),
        train_attn=any(is_attention.values()),
    )
    # This service scales every adapter by LORA_ALPHA / rank.
    scale = np.float32(alpha / LORA_ALPHA)
    weights = {
        name: array.astype(np.float32) * (scale if (found := parts[name]) and found[1] == "B" else np.float32(1))
        for name, array in state.items()
    }
    base = config.get("base_model_name_or_path")
    return Checkpoint(id, str(base or ""), lora, False, now, None, 0), weights


def _rank_and_alpha(folder: Path, config: Any) -> tuple[int, float]:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserFault(f"{folder}: adapter_config.json does not describe a LoRA adapter")
    for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(name):
            raise UserFault(f"{folder}: {name} is set in adapter_config.json, which this service does not support")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise UserFault(f"{folder}: r is {rank!r} in adapter_config.json, and must be a positive integer")
    if not isinstance(alpha, int | float) or alpha <= 0:
        raise UserFault(f"{folder}: lora_alpha is {alpha!r} in adapter_config.json, and must be a positive number")
    return rank, float(alpha)


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

    def routes(self) -> dict[str, Handler]:
        run, checkpoint = "training_runs/{run}", "training_runs/{run}/checkpoints/{kind}/{name}"
        return {
            "GET training_runs": self.list_runs,
            f"GET {run}": self.get_run,
            f"GET {run}/checkpoints": self.list_checkpoints_of_run,
            "GET checkpoints": self.list_checkpoints,
            f"DELETE {checkpoint}": self.delete_checkpoint,
            f"PUT {checkpoint}/ttl": self.set_ttl,
            f"POST {checkpoint}/publish": functools.partial(self.publish, True),
            f"DELETE {checkpoint}/publish": functools.partial(self.publish, False),
            "POST weights_info": self.weights_info,
            "POST copy_weights": self.copy_weights,
        }

    async def list_runs(self, request: web.Request) -> dict[str, Any]:
        """One page of runs (of one project, with ``project_id``), most recently used first."""
        project = request.query.get("project_id")
        runs = [
            fields
            for fields in await self._runs()
            if project in (None, self._sessions.project_of(fields["training_run_id"].partition(":")[0]))
        ]
        page, cursor = page_of(request, runs)
        return {"training_runs": page, "cursor": cursor}

    async def get_run(self, request: web.Request) -> dict[str, Any]:
        runs = await self._runs(request.match_info["run"])
        if not runs:
            raise NotFound(f"no training run {request.match_info['run']!r}")
        return runs[0]

    async def list_checkpoints(self, request: web.Request) -> dict[str, Any]:
        page, cursor = page_of(request, await self._newest_first(), limit=100)
        return {"checkpoints": page, "cursor": cursor}

    async def list_checkpoints_of_run(self, request: web.Request) -> dict[str, Any]:
        """All checkpoints of a run, newest first, without pagination."""
        return {"checkpoints": await self._newest_first(request.match_info["run"])}

    async def delete_checkpoint(self, request: web.Request) -> None:
        await anyio.to_thread.run_sync(self._checkpoints.delete, _id(request), time.time())

    async def set_ttl(self, request: web.Request) -> None:
        now = time.time()
        expires_at = _expiry(await body_of(request), now)
        await anyio.to_thread.run_sync(self._checkpoints.set_expiry, _id(request), expires_at, now)

    async def publish(self, public: bool, request: web.Request) -> None:
        """Publishes or unpublishes. Idempotent: the SDK would retry a 409 for five minutes."""
        await anyio.to_thread.run_sync(self._checkpoints.set_public, _id(request), public, time.time())

    async def weights_info(self, request: web.Request) -> dict[str, Any]:
        id = CheckpointId.parse((await body_of(request)).text("tinker_path"))
        checkpoint = await anyio.to_thread.run_sync(self._checkpoints.find, id, time.time())
        lora = checkpoint.lora
        return {
            "base_model": checkpoint.base_model,
            "is_lora": True,
            "lora_rank": lora.rank,
            "train_unembed": lora.train_unembed,
            "train_mlp": lora.train_mlp,
            "train_attn": lora.train_attn,
        }

    async def copy_weights(self, request: web.Request) -> dict[str, Any]:
        """Copies a checkpoint into its own, already ended session. Idempotent by ``X-Idempotency-Key``."""
        body, now = await body_of(request), time.time()
        source, project = CheckpointId.parse(body.text("source_path")), body.text("destination_project_id")
        key = request.headers.get("X-Idempotency-Key") or secrets.token_hex(8)
        if key not in self._copies:
            expires_at = _expiry(body, now)
            session = secrets.token_hex(8)
            to = replace(source, run=model_id(session, 0))
            copied = await anyio.to_thread.run_sync(self._checkpoints.copy, source, to, expires_at, now)
            name = f"copy of {source.path}"[:200]
            self._records.note(SessionRecord(session, now, None, name, project, (to.run,)))
            self._records.note(RunRecord(to.run, copied.base_model, copied.lora.rank, now, copied.user_metadata))
            await self._records.flush()
            self._copies[key] = to.path
        return {"tinker_path": self._copies[key]}

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
        "model_owner": "local",
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


def _id(request: web.Request) -> CheckpointId:
    return CheckpointId.of(request.match_info["run"], request.match_info["kind"], request.match_info["name"])
