"""Weights that clients take away: PEFT folders behind signed URLs, and adapters that come in from a folder.

``save_weights_external`` stores a checkpoint of the kind ``external_weights``: the adapter's matrices under PEFT's names
and nothing else. Its two files, ``adapter_model.safetensors`` and ``adapter_config.json``, are downloaded from signed URLs:
an HMAC-SHA256 over the checkpoint, the file and the time at which the URL expires, under a key of this process. Whoever
holds such a URL needs no API key, as with the URLs of a cloud's object store.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio.to_thread
import numpy as np
from aiohttp import web
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from searchr1_async.errors import CheckpointError
from searchr1_async.local.answers import SIGNED_ROUTE, json_answer, timestamp
from searchr1_async.local.backend import Backend, LoraConfig, State, UserFault
from searchr1_async.local.checkpoints import Checkpoint, CheckpointId, CheckpointStore
from searchr1_async.local.jobs import result_of
from searchr1_async.local.models import published_name
from searchr1_async.local.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    IMPORT_ROUTE,
    LORA_ALPHA,
    adapter_config,
    lora_parts,
)
from searchr1_async.local.protocol import Body, optional
from searchr1_async.local.records import RecordStore, RunRecord

URL_SECONDS = 3600
"""How long a signed URL is valid."""


class External:
    """The routes of external weights.

    Args:
        backend: computes; checks that an imported adapter fits its model.
        checkpoints: where everything is stored.
        records: what is known of the runs.
    """

    def __init__(self, backend: Backend, checkpoints: CheckpointStore, records: RecordStore) -> None:
        self._backend = backend
        self._checkpoints = checkpoints
        self._records = records
        self._secret = secrets.token_bytes(32)

    def add_routes(self, app: web.Application, prefix: str) -> None:
        """Adds the routes below ``prefix``."""
        checkpoint = f"{prefix}/training_runs/{{run}}/checkpoints/external_weights/{{name}}"
        app.router.add_get(f"{checkpoint}/external_weights_urls", self.list_urls)
        self._signed = f"{prefix}/external_weights"
        app.router.add_get(f"{self._signed}/{{run}}/{{name}}/{{file}}", self.download, name=SIGNED_ROUTE)
        app.router.add_post(f"{prefix}/{IMPORT_ROUTE}", self.import_weights)

    async def list_urls(self, request: web.Request) -> web.Response:
        """``external_weights_urls``: one signed URL for each file, and when they expire."""
        id = CheckpointId.of(request.match_info["run"], "external_weights", request.match_info["name"])
        await anyio.to_thread.run_sync(self._checkpoints.find, id, time.time())
        expires = int(time.time()) + URL_SECONDS
        base = f"{request.scheme}://{request.host}{self._signed}/{quote(id.run, safe='')}/{id.name}"
        urls = {
            file: f"{base}/{file}?expires={expires}&signature={self._sign(id.run, id.name, file, expires)}"
            for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        }
        return json_answer(urls=urls, expires=timestamp(expires))

    async def download(self, request: web.Request) -> web.StreamResponse:
        """One file of a checkpoint, to whoever has its signed URL; 403 where that is wrong or has expired."""
        run, name, file = (request.match_info[part] for part in ("run", "name", "file"))
        try:
            expires = int(request.query.get("expires", ""))
        except ValueError:
            expires = 0
        signature = request.query.get("signature", "").encode("utf-8", "replace")
        if not hmac.compare_digest(signature, self._sign(run, name, file, expires).encode()):
            raise web.HTTPForbidden(reason="the signature of this URL is wrong: ask for new URLs")
        if time.time() >= expires:
            raise web.HTTPForbidden(reason="this URL has expired: ask for new URLs")
        id = CheckpointId.of(run, "external_weights", name)
        checkpoint = await anyio.to_thread.run_sync(self._checkpoints.find, id, time.time())
        path = self._checkpoints.file_of(checkpoint)
        if file == ADAPTER_WEIGHTS:
            # Ranges included: a download that breaks off can be continued.
            return web.FileResponse(path)
        config = await anyio.to_thread.run_sync(_config_of, checkpoint, path)
        return web.Response(body=json.dumps(config, indent=1).encode(), content_type="application/json")

    def _sign(self, run: str, name: str, file: str, expires: int) -> str:
        # None of the parts can hold a line break: run and name are checked, the file is one segment of a path.
        message = "\n".join((run, name, file, str(expires)))
        return hmac.new(self._secret, message.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    async def import_weights(self, request: web.Request) -> web.Response:
        """Copies an adapter of this machine into the checkpoints, as training weights without an optimizer.

        Fields of the request: ``folder``, and either ``tinker_path`` (the folder is another embedded service's, the path
        one of its checkpoints, which keeps its name) or ``name`` (the folder is a PEFT adapter). The base model, the names
        and the shapes are checked before anything is stored. Only this service has the route; the cloud does not.
        """
        body = Body.parse(await request.read())
        folder, now = Path(body.text("folder")), time.time()
        source = optional(body.fields, "tinker_path", str, "")
        if source:
            id = CheckpointId.parse(source)
            if id.kind != "weights":
                raise UserFault(f"{source} cannot be imported: only training weights (tinker://RUN/weights/NAME) can")
            found = await anyio.to_thread.run_sync(_read_checkpoint, folder, id, now)
            run = await anyio.to_thread.run_sync(_read_run, folder, id)
        else:
            id = CheckpointId.of("imported", "weights", body.text("name"))
            found, run = await anyio.to_thread.run_sync(_read_adapter, folder, id, now), None
        checkpoint, state = found
        if published_name(checkpoint.base_model) != published_name(self._backend.model_name):
            raise UserFault(
                f"the weights in {folder} were trained from {checkpoint.base_model!r}, and this service has "
                f"{self._backend.model_name!r}"
            )
        checkpoint = replace(checkpoint, base_model=self._backend.model_name, created_at=now, expires_at=None)
        # The backend knows the names and shapes that its model has; it refuses what is missing and ignores the rest.
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
        return json_answer(path=id.path, lora_rank=checkpoint.lora.rank)


def _config_of(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {checkpoint.id.path} cannot be read: {error}") from error
    return adapter_config(names, base_model=published_name(checkpoint.base_model), rank=checkpoint.lora.rank)


def _read_checkpoint(folder: Path, id: CheckpointId, now: float) -> tuple[Checkpoint, State]:
    """A checkpoint of the embedded service whose folder is given, without the optimizer."""
    if not (folder / "checkpoints").is_dir():
        raise UserFault(f"{folder} is no folder of an embedded service: it has no checkpoints")
    checkpoint, state = CheckpointStore(folder / "checkpoints").load(id, now)
    weights = {name: array for name, array in state.items() if not name.startswith("optimizer.")}
    return replace(checkpoint, has_optimizer=False), weights


def _read_run(folder: Path, id: CheckpointId) -> RunRecord | None:
    """What the other service knows of the run of its checkpoint."""
    records = RecordStore(folder / "checkpoints")
    records.read()
    return records.runs.get(id.run)


def _read_adapter(folder: Path, id: CheckpointId, now: float) -> tuple[Checkpoint, State]:
    """A PEFT folder as a checkpoint.

    Raises :class:`UserFault`: it is none, or one that this service cannot train.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserFault(f"{folder} is no PEFT adapter that can be read: {error}") from None
    rank, alpha = _rank_and_alpha(folder, config)
    parts = {name: lora_parts(name) for name in state}
    if unknown := sorted(name for name, found in parts.items() if found is None):
        raise UserFault(f"{folder}: {unknown[0]} is no LoRA matrix ({len(unknown)} such names)")
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
        raise UserFault(f"{folder}: adapter_config.json is of no LoRA adapter")
    for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(name):
            raise UserFault(f"{folder}: {name} is set in adapter_config.json, which this service does not support")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise UserFault(f"{folder}: r is {rank!r} in adapter_config.json, and must be a positive integer")
    if not isinstance(alpha, int | float) or alpha <= 0:
        raise UserFault(f"{folder}: lora_alpha is {alpha!r} in adapter_config.json, and must be a positive number")
    return rank, float(alpha)
