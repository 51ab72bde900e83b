"""Weights a run starts from: another run's, a service's, or a PEFT adapter's."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import tinker
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

from searchr1_async.errors import ConfigurationError, RunFolderError, ServiceError
from searchr1_async.events import Emit, Notice
from searchr1_async.runs.checkpoints import ResumePoint
from searchr1_async.runs.weights import TINKER_PATH, Step, Weights, find_state, parse_step
from searchr1_async.service.connection import Service, ServiceName, is_embedded, wait_for
from searchr1_async.service.startup import ADAPTER_CONFIG, IMPORT_ROUTE, published_base

DEFAULT_RANK = 32
"""Rank of a new adapter."""


@dataclass(frozen=True, slots=True)
class Start:
    """Weights to start from; the optimizer is always new."""

    name: str
    """The user's ``start_from``; a resume must be given the same."""
    state: Weights | None = None
    """A run's state or a ``tinker://`` path; None for an adapter, and for a resumed run, which needs neither."""
    adapter: Path | None = None
    """A PEFT folder."""
    rank: int | None = None
    """LoRA rank; None if only the service knows it."""
    base_model: str | None = None
    """Their base model; None if only the service knows it."""


def find_start(start_from: str | Path, service: ServiceName, out_dir: Path) -> Start:
    """Parses ``start_from``. Reads only small files.

    Args:
        start_from: a run's folder (its last kept weights, or ``"runs/first@best"`` or ``"runs/first@40"`` for a step), a
            ``tinker://RUN/weights/NAME`` path, or a PEFT adapter's folder.
        service: the new run's service.
        out_dir: the new run's folder.

    Raises:
        ConfigurationError: it is none of these, or the service cannot use these weights.
        RunFolderError: the run has not kept this step.
    """
    name = str(start_from)
    if name.startswith(TINKER_PATH):
        return Start(name, find_state(name))
    folder, step = _split_step(name)
    if folder.resolve() == out_dir.resolve():
        raise ConfigurationError(f"start_from is the run's own folder {out_dir}: pass resume=True to continue it")
    if (folder / ADAPTER_CONFIG).is_file():
        if service is None and not is_embedded(service):
            raise ConfigurationError(
                f"start_from={name!r} is a PEFT adapter, which only the embedded service accepts: pass a tinker:// path instead"
            )
        rank, base_model = _read_config(folder)
        return Start(name, adapter=folder, rank=rank, base_model=base_model)
    point = ResumePoint.load(folder) if folder.is_dir() else None
    if point is None:
        raise ConfigurationError(
            f"start_from={name!r} is neither a run's folder nor a PEFT adapter's: pass one of these, or a tinker:// path"
        )
    state = find_state(folder, step)
    if state.service_folder is None and is_embedded(service):
        raise RunFolderError(
            f"the weights of {folder} are on a Tinker service, but this run would use the embedded one"
        )
    if state.service_folder is not None and service is None and not is_embedded(service):
        raise RunFolderError(
            f"the weights of {folder} are on its embedded service, but this run would use the service of TINKER_API_KEY or "
            "TINKER_BASE_URL: unset them"
        )
    return Start(name, state, rank=_rank_of(point), base_model=point.base_model)


def resumed_start(start_from: str | Path, point: ResumePoint) -> Start:
    """The start of a resumed run, whose own weights already contain it; the original need not exist any more."""
    return Start(str(start_from), rank=_rank_of(point), base_model=point.settings.get("model"))


def chosen_rank(lora_rank: int | None, start: Start | None) -> int:
    """The LoRA rank to train with; refuses a ``lora_rank`` other than the weights'."""
    if start is None or start.rank is None:
        return DEFAULT_RANK if lora_rank is None else lora_rank
    if lora_rank not in (None, start.rank):
        raise ConfigurationError(
            f"lora_rank is {lora_rank}, but the weights of start_from={start.name!r} have rank {start.rank}: leave lora_rank out"
        )
    return start.rank


def chosen_model(model: str | None, start: Start | None) -> str | None:
    """The base model to train; refuses a ``model`` other than the weights' base model."""
    found = start.base_model if start is not None else None
    if model is not None and found is not None and published_base(model) != published_base(found):
        raise ConfigurationError(
            f"model is {model!r}, but the weights to start from were trained from {found!r}: leave model out"
        )
    # An adapter names its base model by its public name; only the user knows the service's name for it.
    return model if model is not None or start is None or start.adapter is not None else found


async def open_start(
    start: Start, service: Service, rank: int, emit: Emit
) -> tuple[tinker.TrainingClient, dict[str, Any]]:
    """A training client with these weights and a new optimizer, and the record of them.

    Raises:
        ConfigurationError: their rank or base model differs from the run's.
        ServiceError: the service does not have them, or cannot load them.
    """
    state = start.state
    if start.adapter is not None:
        path = await _import_weights(service, start.adapter)
    else:
        assert state is not None, "a resumed run opens its own state"
        assert state.path is not None
        path = state.path
        if state.service_folder is not None:
            path = await _import_weights(service, state.service_folder, tinker_path=path)
    info = await service.weights_info(path)
    if info.lora_rank is not None and info.lora_rank != rank:
        raise ConfigurationError(
            f"the weights of start_from={start.name!r} have rank {info.lora_rank}, but the run trains with {rank}: pass "
            f"lora_rank={info.lora_rank}"
        )
    if published_base(info.base_model) != published_base(service.model_name):
        raise ConfigurationError(
            f"the weights of start_from={start.name!r} were trained from {info.base_model!r}, but the run trains "
            f"{service.model_name!r}: pass model={info.base_model!r}"
        )
    client = await service.load_weights(path)
    step = state.step if state is not None else None
    emit(Notice(f"starting from {start.name}{'' if step is None else f' (step {step})'}, with a new optimizer"))
    return client, {"name": start.name, "path": path, "step": step, "base_model": info.base_model}


async def _import_weights(service: Service, folder: Path, *, tinker_path: str | None = None) -> str:
    """Copies local weights (a PEFT adapter's folder, or a path within another embedded service's folder) into an embedded
    service's checkpoints; returns their ``tinker://`` path."""
    holder = service.client.holder
    fields = {"folder": str(await anyio.Path(folder).resolve())}
    fields |= {"tinker_path": tinker_path} if tinker_path else {"name": secrets.token_hex(8)}

    async def send() -> Any:
        with holder.aclient(ClientConnectionPoolType.TRAIN) as client:
            return await client.post(f"/api/v1/{IMPORT_ROUTE}", body=fields, cast_to=object)

    try:
        answer = await wait_for(f"importing {folder}", lambda: holder.run_coroutine_threadsafe(send()))
    except ServiceError as error:
        if isinstance(error.__cause__, tinker.NotFoundError) and "does not exist" not in str(error):
            raise ServiceError(
                f"{folder} cannot be imported: only the embedded service loads weights from a folder, and this run uses "
                "another. Pass a tinker:// path of this service."
            ) from error
        raise
    return answer["path"]


def _split_step(name: str) -> tuple[Path, Step]:
    if not Path(name).exists() and "@" in name:
        folder, _, text = name.rpartition("@")
        if (step := parse_step(text)) is not None:
            return Path(folder), step
    return Path(name), "last"


def _rank_of(point: ResumePoint) -> int | None:
    return (point.settings.get("learning") or {}).get("lora_rank")


def _read_config(folder: Path) -> tuple[int, str | None]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        rank, base_model = config["r"], config.get("base_model_name_or_path")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"{folder / ADAPTER_CONFIG} is not an adapter configuration: {type(error).__name__}: {error}"
        ) from error
    if type(rank) is not int or rank < 1 or not isinstance(base_model, str | None):
        raise ConfigurationError(
            f"{folder / ADAPTER_CONFIG} is not a LoRA adapter's: r is {rank!r}, base_model_name_or_path {base_model!r}"
        )
    return rank, base_model
