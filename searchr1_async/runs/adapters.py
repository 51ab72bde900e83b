"""LoRA adapters: downloaded from a service, and merged into their base model.

Merging takes one weights file at a time: W + alpha / r · B A (Hu et al. 2021, eq. 3). A tied head that the adapter changes is untied:
the head becomes embedding plus update, the embedding is unchanged. (PEFT 0.21 also adds the head's update to the embedding.)
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import aiohttp
import anyio
import anyio.to_thread

from searchr1_async.data.hub import append_body, download_session, fault_of, retried
from searchr1_async.errors import ExportError, ServiceError
from searchr1_async.service.connection import Service
from searchr1_async.service.startup import ADAPTER_CONFIG, ADAPTER_WEIGHTS, lora_parts

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

EXTERNAL_SECONDS = 3600
"""TTL of the temporary external weights if they cannot be deleted: the shortest that Tinker accepts."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Backoff in seconds between retries; any received byte resets it."""
_DELETE_SECONDS = 15.0
_MARGIN = timedelta(minutes=5)
"""URLs that expire within this time are signed again before the next file."""
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEADS = {"lm_head": "lm_head", "model.unembed_tokens": "lm_head", "unembed_tokens": "lm_head"}
"""The output head's path in PEFT and Tinker, mapped to its name in a Hugging Face folder."""
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types that store projections as [in, out]."""
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}
_UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


async def download_adapter(service: Service, state_path: str, folder: Path) -> None:
    """Downloads the adapter of a training state into an empty folder.

    Loads the state (``tinker://…/weights/…``) in a separate session, saves it as external weights and deletes these after the
    download. Raises ServiceError if the state is gone or external weights are not offered, ExportError if the download fails.
    """
    async with service.session() as own:
        client = await own.load_weights(state_path)
        path = await own.save_external(client, f"export-{secrets.token_hex(4)}", ttl_seconds=EXTERNAL_SECONDS)
        try:
            await _Download(own, path, folder).run()
        finally:
            with anyio.move_on_after(_DELETE_SECONDS, shield=True):
                try:
                    await own.delete_checkpoint(path)
                except ServiceError as error:
                    logger.info("%s could not be deleted and expires in an hour: %s", path, error)


class _Download:
    def __init__(self, service: Service, path: str, folder: Path) -> None:
        self._service, self._path, self._folder = service, path, folder
        self._urls: dict[str, str] = {}
        self._expires = datetime.min.replace(tzinfo=UTC)

    async def run(self) -> None:
        await self._sign()
        if not self._urls:
            raise ExportError(f"{self._path} has no files")
        for name in self._urls:
            parts = PurePosixPath(name).parts
            if not parts or name.startswith("/") or ".." in parts or set(name) & {"\\", ":", "\0"}:
                raise ExportError(f"the service lists a file {name!r}, which is outside the folder")
        # Without the API key: the URLs may point to another host.
        async with download_session() as session:
            for name in sorted(self._urls):
                if datetime.now(UTC) >= self._expires - _MARGIN:
                    await self._sign()
                target = self._folder / name
                try:
                    await anyio.Path(target.parent).mkdir(parents=True, exist_ok=True)
                    await self._file(session, name, target)
                except OSError as error:
                    if isinstance(error, aiohttp.ClientError | TimeoutError):
                        raise
                    raise ExportError(f"{target} cannot be written: {error.strerror or error}") from error

    async def _sign(self) -> None:
        answer = await self._service.external_urls(self._path)
        if missing := set(self._urls) - set(answer.urls):
            raise ExportError(f"the service no longer signs {min(missing)} of {self._path}: export again")
        self._urls, self._expires = dict(answer.urls), answer.expires

    async def _file(self, session: aiohttp.ClientSession, name: str, target: Path) -> None:
        """Downloads a file, resuming after interruptions and signing again if the URL is rejected."""

        async def wait(error: Exception, seconds: float | None) -> None:
            reason = fault_of(error)
            if seconds is None:
                raise ExportError(
                    f"{name} of {self._path} could not be downloaded ({reason}) in {len(PAUSES) + 1} attempts: check the "
                    "connection and export again"
                ) from error
            if isinstance(error, aiohttp.ClientResponseError) and error.status in (401, 403, 410):
                await self._sign()
            logger.info("%s of %s: %s; retrying in %g s", name, self._path, reason, seconds)
            await anyio.sleep(seconds)

        with target.open("wb", buffering=0) as output:
            await retried(lambda: self._part(session, name, output), output.tell, PAUSES, wait)

    async def _part(self, session: aiohttp.ClientSession, name: str, output: BinaryIO) -> bool:
        """Downloads the missing part, or all if the server gives no parts."""
        start = output.tell()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        async with session.get(self._urls[name], headers=headers) as response:
            response.raise_for_status()
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                output.seek(0)
                output.truncate()
                start = 0
            await append_body(response, output)
            size = response.headers.get("Content-Length")
            if size is not None and output.tell() != start + int(size):
                raise aiohttp.ClientPayloadError("the response ended early")
        return True


@dataclass(frozen=True, slots=True)
class Adapter:
    updates: Mapping[str, tuple[Tensor, Tensor]]
    """A [rank, in] and B [out, rank] by module path."""
    scale: float
    """alpha / r."""


def read_adapter(folder: Path) -> Adapter:
    """Reads a PEFT folder. Raises ExportError if it is damaged, or an unsupported kind of adapter."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        state = load_file(folder / ADAPTER_WEIGHTS)
        scale = float(config["lora_alpha"]) / int(config["r"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise ExportError(f"the adapter in {folder} cannot be read: {type(error).__name__}: {error}") from error
    if used := [name for name in _UNSUPPORTED if config.get(name)]:
        raise ExportError(f"the adapter uses {used[0]}, which cannot be merged here: export it with format='peft'")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, matrix in state.items():
        parts = lora_parts(name)
        if parts is None or matrix.ndim != 2:
            raise ExportError(
                f"{name} of the adapter is not a LoRA matrix of a linear layer (experts use other shapes): export it with "
                "format='peft', or merge it with the model family's own tool"
            )
        halves.setdefault(parts[0], {})[parts[1]] = matrix
    if odd := [path for path, pair in halves.items() if set(pair) != {"A", "B"}]:
        raise ExportError(f"the adapter lacks one of the two matrices of {odd[0]}")
    if not halves:
        raise ExportError("the adapter has no matrices")
    return Adapter({path: (pair["A"], pair["B"]) for path, pair in halves.items()}, scale)


def merge(base: Path, adapter: Adapter, folder: Path, *, check: Callable[[], None] = lambda: None) -> None:
    """Writes a Hugging Face folder with merged weights, in the base's precision.

    Holds the adapter and one weights file in memory. Blocking: call it in a thread.

    Args:
        base: a Hugging Face folder with safetensors; its other files are copied.
        check: called before each weight; may raise to cancel.

    Raises ExportError if adapter and base do not match or the base has no safetensors, OSError if the folder cannot be written.
    """
    files = _weights_files(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    targets = _targets(adapter, {name for names in files.values() for name in names})
    head = next((path for path, name in targets.items() if name is None), None)
    source = _embedding(files) if head is not None else None
    is_head_adapted = any(path in _HEADS for path in targets)
    folder.mkdir(parents=True, exist_ok=True)
    by_weight = {name: path for path, name in targets.items() if name is not None}
    merger = _Merger(adapter, by_weight, is_transposed=config.get("model_type") in _TRANSPOSED, check=check)
    added = 0
    for file, names in files.items():
        tensors = merger.merged(base / file, names)
        if head is not None and source in names:
            # Read from the base again: ``tensors`` may already contain an updated embedding.
            tensors["lm_head.weight"] = merger.update(merger.read(base / file, source), head, "lm_head.weight")
            added = tensors["lm_head.weight"].nbytes
        merger.write(tensors, folder / file)
        del tensors
    _copy_others(base, folder)
    if (base / _INDEX).is_file():
        _write_index(base, folder, files, source, added)
    if is_head_adapted:
        _untie(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _weights_files(base: Path) -> dict[str, tuple[str, ...]]:
    from safetensors import safe_open

    if (base / _INDEX).is_file():
        index = json.loads((base / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(index.values()))
    else:
        names = [_SINGLE]
    if missing := [name for name in names if not (base / name).is_file()]:
        raise ExportError(
            f"the base model in {base.name} has no {missing[0]}: merging needs weights as safetensors; pass another copy with "
            "base_model="
        )
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        with safe_open(base / name, framework="pt") as file:
            found[name] = tuple(file.keys())
    return found


def _targets(adapter: Adapter, names: Iterable[str]) -> dict[str, str | None]:
    """The base's weight for each adapter module; None for a head that is tied to the embedding."""
    known, found, lost = set(names), dict[str, str | None](), list[str]()
    for path in adapter.updates:
        weight = f"{_HEADS.get(path, path)}.weight"
        if weight in known:
            found[path] = weight
        elif path in _HEADS:
            found[path] = None
        else:
            lost.append(path)
    if lost:
        raise ExportError(
            f"the base model has no weight for {lost[0]} ({len(lost)} of the adapter's {len(adapter.updates)} modules are "
            "unmatched): it is a different model or uses other weight names. Check base_model=, or export with format='peft'."
        )
    if len(set(found.values())) < len(found):
        raise ExportError("two modules of the adapter change the same weight")
    return found


def _embedding(files: Mapping[str, tuple[str, ...]]) -> str:
    names = [name for found in files.values() for name in found]
    for ending in ("embed_tokens.weight", "wte.weight", "embed_in.weight"):
        if len(matching := [name for name in names if name.endswith(ending)]) == 1:
            return matching[0]
    raise ExportError(
        "the adapter changes the output head, but the base model has neither a head nor a single embedding to copy"
    )


class _Merger:
    def __init__(
        self, adapter: Adapter, by_weight: Mapping[str, str], *, is_transposed: bool, check: Callable[[], None]
    ) -> None:
        self._adapter, self._by_weight = adapter, by_weight
        self._is_transposed, self._check = is_transposed, check

    def merged(self, path: Path, names: Iterable[str]) -> dict[str, Tensor]:
        from safetensors import safe_open

        tensors: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in names:
                self._check()
                weight, module = file.get_tensor(name), self._by_weight.get(name)
                tensors[name] = weight if module is None else self.update(weight, module, name)
        return tensors

    def read(self, path: Path, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def update(self, weight: Tensor, module: str, name: str) -> Tensor:
        """W + alpha / r · B A, computed in float32 and cast to the weight's dtype; ExportError on a shape mismatch."""
        import torch

        a, b = (matrix.to(torch.float32) for matrix in self._adapter.updates[module])
        transposed = self._is_transposed and module not in _HEADS
        shape = (b.shape[0], a.shape[1])
        if a.shape[0] != b.shape[1] or tuple(weight.shape) != (shape[::-1] if transposed else shape):
            raise ExportError(
                f"the adapter's update for {module} has shape [{shape[0]}, {shape[1]}], but {name} of the base model is "
                f"{list(weight.shape)}: it is a different model"
            )
        change = (b @ a).mul_(self._adapter.scale)
        return (change.T if transposed else change).add(weight.to(torch.float32)).to(weight.dtype).contiguous()

    def write(self, tensors: dict[str, Tensor], path: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes 0600; a server may run as another user


def _copy_others(base: Path, folder: Path) -> None:
    for path in base.iterdir():
        if path.is_file() and path.suffix not in _NOT_COPIED and path.name != _INDEX and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)


def _write_index(
    base: Path, folder: Path, files: Mapping[str, tuple[str, ...]], source: str | None, added: int
) -> None:
    index = json.loads((base / _INDEX).read_text(encoding="utf-8"))
    if source is not None:
        index["weight_map"]["lm_head.weight"] = next(file for file, names in files.items() if source in names)
        size = index.get("metadata", {}).get("total_size")
        if isinstance(size, int | float) and math.isfinite(size):
            index["metadata"]["total_size"] = int(size) + added
    (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _untie(config: dict[str, Any]) -> None:
    """Sets the flag in nested configurations too, whose default may be "tied"."""
    config["tie_word_embeddings"] = False
    for inner in ("text_config", "llm_config"):
        if isinstance(config.get(inner), dict):
            config[inner]["tie_word_embeddings"] = False
