"""``export``: trained weights as a PEFT adapter or as merged weights, in a folder or on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import json
import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import aiohttp
import anyio
import anyio.from_thread
import anyio.to_thread
import tinker

from searchr1_async.boundary.paths import FilePath, NameOrFolder, folder_at
from searchr1_async.boundary.settings import checked_arguments
from searchr1_async.boundary.waits import in_thread
from searchr1_async.config import LocalOptions
from searchr1_async.data.hub import append_body, download_session, fault_of, retried
from searchr1_async.errors import ConfigurationError, ExportError, RunFolderError, ServiceError, ungrouped
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.runs.adapters import merge, model_card, read_adapter
from searchr1_async.runs.control import run_under_way
from searchr1_async.runs.folder import is_claimed
from searchr1_async.runs.rollouts import ServiceChoice, opened_service
from searchr1_async.runs.weights import Step, Weights, as_weights, find_state
from searchr1_async.service.connection import Service, ServiceName, find_endpoint, is_embedded
from searchr1_async.service.opening import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_folder,
    base_model_of,
    check_service,
    lora_parts,
    published_base,
)

logger = logging.getLogger(__name__)

Format = Literal["peft", "merged"]
EXTERNAL_SECONDS = 3600
"""TTL of the temporary external weights if they cannot be deleted: the shortest that Tinker accepts."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts of a download; reset whenever bytes arrive."""
_DELETE_SECONDS = 15.0


class RunWithFolder(Protocol):
    """A :class:`~searchr1_async.runs.run.RecordedRun`; that module imports this one."""

    @property
    def out_dir(self) -> Path: ...


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
    on_event: Emit | None = None,
) -> Path:
    """Exports trained weights into a folder that other software can load.

    The service saves the adapter as temporary external weights, which are downloaded and deleted. A run in progress in this
    process exports through its own service; for a finished run of the embedded service, one is started on the run's folder.

    Args:
        run: a run, a run's folder, or a ``tinker://RUN/weights/NAME`` path.
        folder: output folder; must be missing or empty. Created atomically.
        step: which of a run's kept weights: ``"last"``, ``"best"`` on held-out questions, or an optimizer step.
        format: ``"peft"`` is a LoRA adapter for transformers + peft, vLLM and SGLang, with tokenizer and model card;
            ``"merged"`` is a Hugging Face folder with the adapter merged into the base model, in its precision. A tied output
            head is untied if the adapter changes it. Needs torch.
        base_model: hub name or folder of the base model. Default: the run's base model, or the embedded service's copy of it.
        push_to_hub: ``"organisation/name"`` of a Hugging Face repository to upload to (with ``HF_TOKEN``).
        private: whether a newly created repository is private.
        service: as in :func:`searchr1_async.train`; not needed for a run in progress in this process.
        service_folder: the embedded service's folder with a ``tinker://`` path; not needed for a run's folder.
        local: options of the embedded service.
        on_event: receives progress events.

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
    if push_to_hub is not None:
        check_hub_name(push_to_hub)
    if format == "merged" and importlib.util.find_spec("torch") is None:
        raise ConfigurationError(
            "format='merged' needs torch: pip install 'searchr1_async[local]', or export with format='peft'"
        )
    await anyio.to_thread.run_sync(_check_target, target)
    find = partial(find_state, given["run"], given["step"], service_folder=given["service_folder"])
    weights = await anyio.to_thread.run_sync(find)
    emit, model = on_event or emit_nothing, weights.base_model
    if model is None and weights.path is not None and not is_embedded(service):
        model = await base_model_of(weights.path, service)
    tokenizer = weights.tokenizer or (base if base is not None and folder_at(base) else None)
    choice = ServiceChoice(service, model or base, local or LocalOptions(), tokenizer)

    async def work(opened: Service) -> Path:
        found = await _download(opened, weights, find, scratch / "peft", emit)
        return await _finish(opened, found, scratch, target, format, base, emit)

    with ungrouped(), _scratch(target) as scratch:
        live = run_under_way(weights.run) if weights.run is not None and service is None else None
        if live is None or await live.control.service.use(work) is None:
            if live is not None:
                await live.control.service.wait_ended()  # two services would share its folder
            await _refuse_run_elsewhere(weights, service)
            emit(Notice(find_endpoint(service).text))
            await check_service(service, choice.model, choice.local, emit=emit)
            async with opened_service(choice, weights.service_folder, emit) as own:
                await work(own)
    if push_to_hub is not None:
        address = await anyio.to_thread.run_sync(partial(push, target, push_to_hub, private=private))
        emit(Notice(f"uploaded to {address}"))
    return target


def _check_target(target: Path) -> None:
    if target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
        raise ConfigurationError(f"{target} already exists and is not empty: choose another folder")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns a write error into an :class:`ExportError`."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}") from error


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, on the same disk."""
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


async def _refuse_run_elsewhere(weights: Weights, service: ServiceName) -> None:
    if weights.run is None or weights.service_folder is None or service is not None:
        return
    if await anyio.to_thread.run_sync(is_claimed, weights.run):
        raise RunFolderError(
            f"the run in {weights.run} is in progress and its service is not accessible from this process: export from the "
            "training process, or after the run has ended"
        )


async def _download(
    service: Service, weights: Weights, find: Callable[[], Weights], adapter: Path, emit: Emit
) -> Weights:
    """Downloads the adapter and returns its weights. A live run deletes a resume point's state after the next step; the newer
    one is used then."""
    while True:
        assert weights.path is not None
        emit(Notice(f"downloading the adapter of {weights.path}"))
        try:
            await download_adapter(service, weights.path, adapter)
        except ServiceError:
            newer = await anyio.to_thread.run_sync(find)
            if newer.path == weights.path:
                raise
            weights = newer
        else:
            return weights


async def _finish(
    service: Service, weights: Weights, scratch: Path, target: Path, format: Format, given: str | None, emit: Emit
) -> Path:
    """Merges the adapter if asked for, adds tokenizer and model card, and moves the folder to the target."""
    adapter, base = scratch / "peft", given or weights.base_model or service.model_name
    name = published_base(service.model_name if folder_at(base) else base)  # a folder is a copy of the base model
    own = service.model_folder if given is None else None
    model = own or await base_folder(base) if format == "merged" else None
    is_quantized = service.model_folder is not None and "q4_1" in service.model_folder.name

    def finish(check: Callable[[], None]) -> None:
        config = _complete_config(adapter, name)
        if model is not None:
            merge(model, read_adapter(adapter), scratch / "merged", check=check)
        try:
            service.tokenizer.save_pretrained(scratch / format)
        except Exception as error:  # a full disk is a bare Exception of the tokenizers library
            raise OSError(f"the tokenizer cannot be saved: {error}") from error
        facts = {
            "name": target.name,
            "base_model": name,
            "format": format,
            "rank": int(config["r"]),
            "step": weights.step,
        }
        card = model_card(facts | {"is_quantized": is_quantized}, weights.run, service.tokenizer)
        (scratch / format / "README.md").write_text(card, encoding="utf-8")
        check()  # an export whose run ends begins again with a service of its own
        if target.exists():
            target.rmdir()  # fails if it is no longer empty
        (scratch / format).replace(target)

    if model is not None:
        emit(Notice(f"merging the adapter into {name}"))
    with _writing(target):
        await in_thread(lambda: finish(anyio.from_thread.check_cancelled))
    emit(Notice(f"exported to {target}"))
    return target


def _complete_config(adapter: Path, base: str) -> dict[str, Any]:
    """Completes ``adapter_config.json`` with keys that loaders need; only the base model's name is overwritten."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
        int(config["r"])
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="np") as file:
            names = list(file.keys())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ExportError(f"the service sent no readable PEFT adapter: {type(error).__name__}: {error}") from error
    modules = sorted({parts[0].rpartition(".")[2] for name in names if (parts := lora_parts(name))})
    defaults = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    config = defaults | {"target_modules": modules, "inference_mode": True} | config | {"base_model_name_or_path": base}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return config


def check_hub_name(name: str) -> None:
    """Raises ConfigurationError for an invalid repository name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigurationError(f"push_to_hub is {name!r}: {error}") from error


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads a folder, creating the repository if needed, and returns its address. Blocking: call it in a thread."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Export of trained weights")
    except Exception as error:  # httpx errors up to huggingface_hub 1.x, httpx2 errors since
        reason = " ".join(str(error).split())
        raise ExportError(
            f"the upload to the Hugging Face hub failed ({type(error).__name__}: {reason}). The export is complete in {folder}: check "
            f"the connection and that HF_TOKEN may write to {name}, then run `hf upload {name} {folder}`."
        ) from error
    return str(repository)


async def download_adapter(service: Service, state_path: str, folder: Path) -> None:
    """Downloads the adapter of a training state into a new folder.

    Loads the state (``tinker://…/weights/…``) in a separate session, saves it as external weights and deletes these after the
    download. Raises ServiceError if the state is gone or external weights are not offered, ExportError if the download fails.
    """
    async with service.session() as own:
        client = await own.load_weights(state_path)
        path = await own.save_external(client, f"export-{secrets.token_hex(4)}", ttl_seconds=EXTERNAL_SECONDS)
        try:
            with _writing(folder):
                await anyio.Path(folder).mkdir(exist_ok=True)
            # Without the API key: the URLs may point to another host.
            async with download_session() as session:
                for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                    await _fetch(session, own, path, folder / name)
        finally:
            with anyio.move_on_after(_DELETE_SECONDS, shield=True):
                try:
                    await own.delete_checkpoint(path)
                except ServiceError as error:
                    logger.info("%s could not be deleted and expires in an hour: %s", path, error)


async def _fetch(session: aiohttp.ClientSession, service: Service, path: str, target: Path) -> None:
    """Downloads a file of external weights. Each attempt has its URL signed, and continues where the last one broke off."""

    async def attempt() -> bool:
        urls = (await service.external_urls(path)).urls
        if target.name not in urls:
            listed = ", ".join(sorted(urls)) or "no files"
            raise ExportError(f"{path} has no {target.name}, only {listed}: it is no PEFT adapter")
        start = output.tell()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        async with session.get(urls[target.name], headers=headers) as response:
            response.raise_for_status()
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                output.seek(0)
                output.truncate()
            await append_body(response, output)  # aiohttp raises if it ends early
        return True

    async def wait(error: Exception, seconds: float | None) -> None:
        if seconds is None:
            raise ExportError(
                f"{target.name} of {path} could not be downloaded ({fault_of(error)}) in {len(PAUSES) + 1} attempts: check the "
                "connection and export again"
            ) from error
        logger.info("%s of %s: %s; retrying in %g s", target.name, path, fault_of(error), seconds)
        await anyio.sleep(seconds)

    with _writing(target), target.open("wb", buffering=0) as output:
        await retried(attempt, output.tell, PAUSES, wait)
