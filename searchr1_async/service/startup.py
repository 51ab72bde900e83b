"""Checks, opens and closes the Tinker service found by :mod:`~searchr1_async.service.connection`. Only this module imports the embedded one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import tinker

from searchr1_async.billing import Billing, billing_of
from searchr1_async.boundary.network import SDK_FAULTS, fault_text, prepare_proxies, probe
from searchr1_async.boundary.paths import folder_at
from searchr1_async.boundary.waits import Notify, bounded_wait
from searchr1_async.config import LocalOptions
from searchr1_async.episodes.rendering import check_thinking, known_format, load_tokenizer, select_renderer
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.local import DEFAULT_MODEL, listener_at, local_service
from searchr1_async.local.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    IMPORT_ROUTE,
    local_copy,
    lora_parts,
    published_name,
    resolve_model,
)
from searchr1_async.models import Price, Thinking, default_cloud_model
from searchr1_async.service.availability import Offered, ask_offered, choose_model
from searchr1_async.service.connection import Service, ServiceName, find_endpoint, is_embedded, is_tinker_cloud, prepare

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "IMPORT_ROUTE",
    "base_folder",
    "base_model_of",
    "billing_on",
    "check_chat_format",
    "check_service",
    "choose_service_model",
    "default_model",
    "load_embedded_tokenizer",
    "lora_parts",
    "open_service",
    "published_base",
]

CONNECT_DEADLINE = 10.0
"""Seconds a service has to answer; the SDK alone would retry for minutes."""
_DOWNLOAD_DEADLINE = 6 * 3600.0
"""Seconds to download a model's or tokenizer's files from the hub."""


def default_model(service: ServiceName) -> str:
    """The default model; a service that does not offer it may get another."""
    return DEFAULT_MODEL if is_embedded(service) else default_cloud_model()


async def base_model_of(path: str, service: ServiceName) -> str:
    """The base model of weights under a ``tinker://`` path, on a service other than the embedded one."""
    if isinstance(service, tinker.ServiceClient):
        return (await Service(service, "", None, is_local=False).weights_info(path)).base_model
    url = prepare(service).url
    if url is not None:
        await probe(url, timeout=CONNECT_DEADLINE)
    async with _client(url, None) as client:
        return (await Service(client, "", None, is_local=False).weights_info(path)).base_model


def published_base(model: str) -> str:
    """A base model's public name: without a suffix such as ``:peft:262144``, and of a folder its last part."""
    return published_name(model).partition(":")[0]


async def base_folder(model: str) -> Path:
    """The folder with a base model's weights, downloaded or converted if needed; :class:`ModelError` if unavailable."""

    def resolve() -> Path:
        return resolve_model(model if folder_at(model) else published_base(model)).folder

    return await anyio.to_thread.run_sync(resolve)


def billing_on(service: ServiceName, model: str | None, price: Price | None = None) -> Billing:
    """How a service, which need not be open, bills a model's tokens.

    Args:
        service: as in :func:`open_service`.
        model: None: the service's default.
        price: the user's price.
    """
    return billing_of(
        model or default_model(service),
        is_embedded=is_embedded(service),
        is_tinker=is_tinker_cloud(service),
        price=price,
    )


async def check_service(
    service: ServiceName,
    model: str | None,
    local: LocalOptions,
    *,
    trains: bool = False,
    emit: Emit = emit_nothing,
) -> str:
    """Refuses a service that :func:`open_service` could not open, before any work starts or anything is written.

    Downloads or converts the embedded service's model if needed; asks other services which models they offer.

    Args:
        trains: the model will be trained, not only sampled from.
        emit: receives a notice for each wait over 5 seconds.

    Returns:
        The name of the model that will be used.

    Raises:
        ConfigurationError: no usable service: see :func:`~searchr1_async.service.connection.prepare`.
        ServiceUnavailableError: no answer within 10 s, or no list of models within 30 s.
        ModelError: the embedded service's model is not available, or the service does not offer the model.
        PortInUseError: the embedded service's port is in use.
    """
    if prepare(service).kind != "embedded":
        return choose_model(model, await _ask(service, trains=trains))[0]
    if local.port:
        listener_at(local.port).close()
    wanted = model or default_model(service)
    with bounded_wait(f"getting the files of {wanted}", _notifier(emit), _DOWNLOAD_DEADLINE):
        await anyio.to_thread.run_sync(resolve_model, wanted, abandon_on_cancel=True)
    return wanted


async def choose_service_model(service: ServiceName, model: str | None) -> tuple[str, str | None]:
    """The model to sample from on a service other than the embedded one, and a note on the choice, if any."""
    return choose_model(model, await _ask(service, trains=False))


async def _ask(service: ServiceName, *, trains: bool) -> Offered:
    """What a service other than the embedded one offers."""
    url = prepare(service).url
    if isinstance(service, tinker.ServiceClient):
        return await ask_offered(lambda: tinker.RestClient(service.holder), trains=trains)
    if url is not None:
        await probe(url, timeout=CONNECT_DEADLINE)
    return await ask_offered(lambda: tinker.RestClient(base_url=url), trains=trains)


@asynccontextmanager
async def open_service(
    service: ServiceName,
    model: str | None,
    *,
    folder: Path,
    local: LocalOptions,
    emit: Emit,
    tokenizer: str | None = None,
    trains: bool = False,
) -> AsyncIterator[Service]:
    """Connects to a service, and disconnects at the end. Services other than the embedded one are asked what they offer first.

    Args:
        service: a base URL, ``"embedded"``, or the user's client (left open at the end). None: the service of
            ``TINKER_BASE_URL``, else the cloud if the SDK has credentials, else the embedded service, started here.
        model: None: SmolLM2-135M-Instruct on the embedded service; elsewhere Qwen3.5-4B, the nearest model of its family the
            service offers, or the only model it offers.
        folder: for the embedded service's checkpoints and log.
        tokenizer: a folder or name, if the model's name does not load one.
        trains: the model will be trained, not only sampled from.

    Raises:
        ServiceUnavailableError: no answer within 10 s, or no list of models within 30 s.
        ServiceStartError, PortInUseError: the embedded service did not start.
        ModelError: the model or its tokenizer is not available.
    """
    if prepare(service).kind == "embedded":
        opening = _open_embedded(model or DEFAULT_MODEL, folder, local, emit, tokenizer)
    else:
        opening = _open_other(service, model, emit, tokenizer, trains=trains)
    async with opening as opened:
        yield opened


@asynccontextmanager
async def _open_other(
    service: ServiceName, model: str | None, emit: Emit, tokenizer: str | None, *, trains: bool
) -> AsyncIterator[Service]:
    offered = await _ask(service, trains=trains)
    name, note = choose_model(model, offered)
    if note is not None:
        emit(Notice(note))
    opened = partial(
        Service,
        model_name=name,
        tokenizer=await _load_tokenizer(name, tokenizer, emit),
        is_local=False,
        is_tinker=is_tinker_cloud(service),
        offered=offered,
        notify=_notifier(emit),
    )
    if isinstance(service, tinker.ServiceClient):
        yield opened(service)
        return
    connect = partial(_client, find_endpoint(service).url, None)
    async with connect() as client:
        yield opened(client, connect=connect)


@asynccontextmanager
async def _open_embedded(
    model: str, folder: Path, local: LocalOptions, emit: Emit, tokenizer: str | None
) -> AsyncIterator[Service]:
    emit(Notice(f"starting the embedded service with {model} on this machine"))
    async with local_service(
        model,
        folder=folder,
        port=local.port,
        threads=local.threads,
        dtype=local.dtype,
        device=local.device,
        start_timeout=local.start_timeout,
        log_path=folder / "service.log",
        notify=_notifier(emit),
    ) as started:
        emit(Notice(f"the embedded service answers at {started.url} (pid {started.pid})"))
        prepare_proxies(started.url)
        connect = partial(_client, started.url, started.api_key)
        async with connect() as client:
            yield Service(
                client,
                started.model_name,
                await _load_tokenizer(started.tokenizer_path, tokenizer, emit),
                is_local=True,
                model_folder=Path(started.tokenizer_path),
                connect=connect,
                notify=_notifier(emit),
            )


async def _load_tokenizer(model: str, tokenizer: str | None, emit: Emit) -> Any:
    """The tokenizer of a model or the named one. A local copy goes first: another service may serve the embedded default model."""

    def source() -> str:
        return tokenizer or str(local_copy(model) or model)

    with bounded_wait(f"loading the tokenizer of {tokenizer or model}", _notifier(emit), _DOWNLOAD_DEADLINE):
        return await load_tokenizer(await anyio.to_thread.run_sync(source))


def _notifier(emit: Emit) -> Notify:
    return lambda text: emit(Notice(text))


@asynccontextmanager
async def _client(url: str | None, api_key: str | None) -> AsyncIterator[tinker.ServiceClient]:
    try:
        client = tinker.ServiceClient(base_url=url, api_key=api_key)
    except SDK_FAULTS as error:
        raise ConfigurationError(
            f"creating a Tinker client failed (is TINKER_API_KEY right?): {fault_text(error)}"
        ) from error
    status = "errored"
    try:
        yield client
        status = "success"
    except BaseException as error:
        status = "errored" if isinstance(error, Exception) else "interrupted"
        raise
    finally:
        # Shielded: close the session of a cancelled run too. Bounded: a dead service must not block the exit.
        with anyio.move_on_after(5, shield=True):
            try:
                await anyio.to_thread.run_sync(lambda: client.close(status).result(timeout=4), abandon_on_cancel=True)
            except Exception as error:  # an unclosed session loses nothing
                del error


async def check_chat_format(
    service: ServiceName,
    model: str,
    tokenizer: str | None,
    *,
    renderer_name: str | None,
    thinking: Thinking,
) -> None:
    """Refuses a model with an unknown chat format or an unsupported ``thinking``.

    Args:
        model: as returned by :func:`check_service`. Its tokenizer is loaded only if its name does not tell the format.
        tokenizer: a folder or name to use instead of the model's own.

    Raises:
        ModelError: as above, or the tokenizer is not available.
    """
    check_thinking(model, renderer_name, thinking)
    if known_format(model, renderer_name) is None:
        embedded = is_embedded(service)
        load = (
            load_embedded_tokenizer(model, tokenizer) if embedded else _load_tokenizer(model, tokenizer, emit_nothing)
        )
        loaded = await load
        await anyio.to_thread.run_sync(select_renderer, model, loaded, renderer_name, thinking)


async def load_embedded_tokenizer(model: str, tokenizer: str | None) -> Any:
    """The tokenizer of an embedded-service model, or the named one, without starting the service.

    Downloads or converts the model if needed; :class:`ModelError` if unavailable.
    """
    files = await anyio.to_thread.run_sync(resolve_model, model)
    return await load_tokenizer(tokenizer or str(files.folder))
