"""``export``: trained weights as a PEFT adapter or as merged weights, in a folder or on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import anyio
import anyio.from_thread
import anyio.to_thread
import tinker

from searchr1_async.boundary.paths import FilePath, NameOrFolder
from searchr1_async.boundary.settings import checked_arguments
from searchr1_async.boundary.waits import in_thread
from searchr1_async.config import LocalOptions
from searchr1_async.errors import ConfigurationError, ExportError, RunFolderError, ServiceError, ungrouped
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.runs.adapters import download_adapter, merge, read_adapter
from searchr1_async.runs.control import run_under_way
from searchr1_async.runs.folder import is_claimed
from searchr1_async.runs.model_card import CardFacts, model_card
from searchr1_async.runs.rollouts import ServiceChoice, opened_service
from searchr1_async.runs.weights import Step, Weights, as_weights, find_state
from searchr1_async.service.connection import Service, find_endpoint, is_embedded
from searchr1_async.service.startup import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_folder,
    base_model_of,
    check_service,
    lora_parts,
    published_base,
)

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")


def check_hub_name(name: str) -> None:
    """Raises ConfigurationError for an invalid repository name."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"push_to_hub is {name!r}: name a repository as 'name' or 'organisation/name'")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads a folder, creating the repository if needed, and returns its address. Blocking: call it in a thread.

    Raises:
        ExportError: the hub rejects the upload or is unreachable; the folder is unchanged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    again = f"The export is complete in {folder}: run `hf upload {name} {folder}` when that is fixed."
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Export of trained weights")
    except OfflineModeIsEnabled as error:
        raise ExportError(f"HF_HUB_OFFLINE prevents uploads to the Hugging Face hub: unset it. {again}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = {401: "it requires a token (set HF_TOKEN)", 403: "the token has no write access"}.get(status)
        raise ExportError(f"the Hugging Face hub rejected {name}: {reason or f'HTTP {status}'}. {again}") from error
    except Exception as error:  # httpx errors up to huggingface_hub 1.x, httpx2 errors since
        raise ExportError(f"the upload to the Hugging Face hub failed ({type(error).__name__}). {again}") from error
    return str(repository)


Format = Literal["peft", "merged"]


class RunWithFolder(Protocol):
    """A :class:`~searchr1_async.runs.recorded.RecordedRun`; that module imports this one."""

    @property
    def out_dir(self) -> Path: ...


@dataclass(frozen=True, slots=True)
class _Request:
    folder: Path
    format: Format
    base_model: str | None
    find: Callable[[], Weights]
    """Finds the weights; in a live run they change with each step."""


async def export(
    run: Annotated[RunWithFolder | str | Path, as_weights],
    folder: FilePath,
    *,
    step: Step = "last",
    format: Format = "peft",
    base_model: NameOrFolder | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    service: str | tinker.ServiceClient | None = None,
    service_folder: FilePath | None = None,
    local: LocalOptions | None = None,
    emit: Emit | None = None,
) -> Path:
    """Exports trained weights into a folder that other software can load.

    The service saves the adapter as temporary external weights, which are downloaded and deleted. A run in progress in this
    process exports through its own service; for a finished run of the embedded service, one is started on the run's folder.

    Args:
        run: a run, a run's folder, or a ``tinker://RUN/weights/NAME`` path.
        folder: output folder; must be missing or empty. Created atomically.
        step: which of a run's kept weights: ``"last"``, ``"best"`` on held-out questions, or an optimiser step.
        format: ``"peft"`` is a LoRA adapter for transformers + peft, vLLM and SGLang, with tokenizer and model card;
            ``"merged"`` is a Hugging Face folder with the adapter merged into the base model, in its precision. A tied output
            head is untied if the adapter changes it. Needs torch.
        base_model: hub name or folder of the base model. Default: the run's base model, or the embedded service's copy of it.
        push_to_hub: ``"organisation/name"`` of a Hugging Face repository to upload to (with ``HF_TOKEN``).
        private: whether a newly created repository is private.
        service: as in :func:`searchr1_async.train`; not needed for a run in progress in this process.
        service_folder: the embedded service's folder with a ``tinker://`` path; not needed for a run's folder.
        local: options of the embedded service.
        emit: receives progress events.

    Returns:
        ``folder``.

    Raises:
        ConfigurationError: invalid input, or the folder is not empty; raised before any work.
        RunFolderError: not a run, the step was not kept (the message lists kept ones), or another process is training it.
        ServiceError: the service lacks the weights or does not offer external weights.
        ExportError: the download, merge or upload failed.
    """
    given = checked_arguments(export, locals())
    target: Path = given["folder"]
    base: str | None = given["base_model"]
    _check(target, format, push_to_hub)
    await anyio.to_thread.run_sync(_check_target, target)
    find = partial(find_state, given["run"], given["step"], service_folder=given["service_folder"])
    weights = await anyio.to_thread.run_sync(find)
    request, emit = _Request(target, format, base, find), emit or emit_nothing
    model = weights.base_model
    if model is None and weights.path is not None and not is_embedded(service):
        model = await base_model_of(weights.path, service)
    tokenizer = await anyio.to_thread.run_sync(_tokenizer_of, weights, base)
    choice = ServiceChoice(service, model or base, local or LocalOptions(), tokenizer)
    with ungrouped():
        async with _service_of(weights, choice, emit) as opened:
            await _export(opened, weights, request, emit)
    if push_to_hub is not None:
        address = await anyio.to_thread.run_sync(partial(push, target, push_to_hub, private=private))
        emit(Notice(f"uploaded to {address}"))
    return target


def _check(target: Path, format: str, push_to_hub: str | None) -> None:
    if push_to_hub is not None:
        check_hub_name(push_to_hub)
    if format == "merged" and importlib.util.find_spec("torch") is None:
        raise ConfigurationError(
            "format='merged' needs torch: pip install 'searchr1_async[local]', or export with format='peft'"
        )
    if target.name in ("", "..", "."):
        raise ConfigurationError(f"cannot export to {target}: choose a new folder")


def _check_target(target: Path) -> None:
    if target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
        raise ConfigurationError(f"{target} already exists and is not empty: choose another folder")


def _tokenizer_of(weights: Weights, base_model: str | None) -> str | None:
    """A local folder with the tokenizer, if there is one; avoids the hub."""
    if weights.run is not None and (weights.run / "tokenizer").is_dir():
        return str(weights.run / "tokenizer")
    return base_model if base_model is not None and Path(base_model).is_dir() else None


@asynccontextmanager
async def _service_of(weights: Weights, choice: ServiceChoice, emit: Emit) -> AsyncIterator[Service]:
    """The service of a run in progress in this process, else a newly opened one."""
    if weights.run is not None and choice.service is None:
        if (under_way := run_under_way(weights.run)) is not None:
            with under_way.control.using_service() as live:
                if live is not None:
                    yield live
                    return
        if weights.service_folder is not None and await anyio.to_thread.run_sync(is_claimed, weights.run):
            raise RunFolderError(
                f"the run in {weights.run} is in progress and its service is not accessible from this process: export from the "
                "training process, or after the run has ended"
            )
    emit(Notice(find_endpoint(choice.service).text))
    await check_service(choice.service, choice.model, choice.local, emit=emit)
    async with opened_service(choice, weights.service_folder, emit) as service:
        yield service


async def _export(service: Service, weights: Weights, request: _Request, emit: Emit) -> None:
    base = request.base_model or weights.base_model or service.model_name
    with _scratch(request.folder) as scratch:
        adapter, merged = scratch / "adapter", scratch / "merged"
        await anyio.to_thread.run_sync(adapter.mkdir)
        weights = await _download(service, weights, request, adapter, emit)
        name = _base_name(base, service)
        config = await anyio.to_thread.run_sync(_finish_config, adapter, name)
        facts = CardFacts(
            name=request.folder.name,
            base_model=name,
            format=request.format,
            rank=int(config["r"]),
            step=weights.step,
            is_head_adapted=any(
                module.endswith(("lm_head", "unembed_tokens")) for module in config.get("target_modules") or ()
            ),
            note=_note(service),
        )
        done = adapter
        if request.format == "merged":
            done = merged
            base_weights = await _base_weights(request, service, base)
            emit(Notice(f"merging the adapter into {name}"))
            await in_thread(lambda: _merge(base_weights, adapter, merged))
        await in_thread(lambda: _finish(done, service.tokenizer, facts, weights.run, request.folder))
    emit(Notice(f"exported to {request.folder}"))


async def _download(service: Service, weights: Weights, request: _Request, adapter: Path, emit: Emit) -> Weights:
    """Downloads the adapter and returns its weights. A live run deletes a resume point's state after the next step; the newer
    one is used then."""
    while True:
        assert weights.path is not None
        emit(Notice(f"downloading the adapter of {weights.path}"))
        try:
            await download_adapter(service, weights.path, adapter)
        except ServiceError:
            newer = await anyio.to_thread.run_sync(request.find)
            if newer.path == weights.path:
                raise
            weights = newer
        else:
            return weights


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, on the same disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}") from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _base_name(base: str, service: Service) -> str:
    """The base model's public name; a folder given by the user is a copy of the run's base model."""
    return published_base(service.model_name if Path(base).is_dir() else base)


def _note(service: Service) -> str:
    if service.model_folder is None or "q4_1" not in service.model_folder.name:
        return ""
    return (
        "The embedded service trained on a float32 copy of the base model's 4-bit (Q4_1) release, so log-probabilities differ "
        "slightly with the hub's weights; merged weights contain that copy."
    )


def _finish_config(adapter: Path, base: str) -> dict[str, Any]:
    """Completes ``adapter_config.json`` with keys that loaders need; only the base model's name is overwritten."""
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
        int(config["r"])
        names = _matrix_names(adapter / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError) as error:
        came = ", ".join(sorted(path.name for path in adapter.iterdir())) or "nothing"
        raise ExportError(f"the service sent no readable PEFT adapter ({error}); it sent: {came}") from error
    modules = sorted({parts[0].rpartition(".")[2] for name in names if (parts := lora_parts(name))})
    defaults = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    config = defaults | {"target_modules": modules, "inference_mode": True} | config | {"base_model_name_or_path": base}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return config


def _matrix_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(str(error)) from error


async def _base_weights(request: _Request, service: Service, base: str) -> Path:
    if request.base_model is None and service.model_folder is not None:
        return service.model_folder
    return await base_folder(base)


def _merge(base: Path, adapter: Path, merged: Path) -> None:
    try:
        merge(base, read_adapter(adapter), merged, check=anyio.from_thread.check_cancelled)
    except OSError as error:
        raise ExportError(f"the merged weights cannot be written: {error.strerror or error}") from error


def _finish(done: Path, tokenizer: Any, facts: CardFacts, run: Path | None, target: Path) -> None:
    """Adds tokenizer and model card, and moves the folder to the target."""
    try:
        tokenizer.save_pretrained(done)
        (done / "README.md").write_text(model_card(facts, run, tokenizer), encoding="utf-8")
        if target.exists():
            target.rmdir()  # fails if it is no longer empty
        done.replace(target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}") from error
