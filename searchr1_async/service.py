"""Checks, opens and closes the Tinker service that :mod:`~searchr1_async.endpoint` finds. Only this module imports the embedded one."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import tinker

from searchr1_async.billing import Billing, billing_of
from searchr1_async.boundary.network import prepare_proxies, probe
from searchr1_async.boundary.paths import folder_at
from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text
from searchr1_async.boundary.waits import Tell, bounded_wait
from searchr1_async.config import LocalOptions
from searchr1_async.connection import Service
from searchr1_async.endpoint import ServiceName, find_endpoint, is_embedded, is_tinker_cloud, prepare
from searchr1_async.episodes.rendering import check_thinking, known_format, select_renderer
from searchr1_async.episodes.tokenizers import load_tokenizer
from searchr1_async.errors import ConfigurationError, PortInUseError
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.local import DEFAULT_MODEL, local_service
from searchr1_async.local.models import local_copy, published_name, resolve_model
from searchr1_async.local.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, IMPORT_ROUTE, lora_parts
from searchr1_async.models import Price, Thinking, default_cloud_model
from searchr1_async.offered import Offered, ask_offered, choose_model

CONNECT_DEADLINE = 10.0
"""Seconds in which a service must answer; the SDK itself would try for minutes."""
_DOWNLOAD_DEADLINE = 6 * 3600.0
"""Seconds for a model's files, or a tokenizer's, from the hub."""


def default_model(service: ServiceName) -> str:
    """The model that is meant where none is named; a service that does not offer it may have another used in its place."""
    return DEFAULT_MODEL if is_embedded(service) else default_cloud_model()


async def base_model_of(path: str, service: ServiceName) -> str:
    """The base model of weights under a ``tinker://`` path of a service that is not the embedded one.

    Raises:
        ServiceError: there are no such weights, or no answer.
    """
    if isinstance(service, tinker.ServiceClient):
        return (await Service(service, "", None, is_local=False).weights_info(path)).base_model
    url = prepare(service).url
    if url is not None:
        await probe(url, timeout=CONNECT_DEADLINE)
    async with _client(url, None) as client:
        return (await Service(client, "", None, is_local=False).weights_info(path)).base_model


def published_base(model: str) -> str:
    """The name by which others find a base model: without a suffix such as ``:peft:262144``, and of a folder its last part."""
    return published_name(model).partition(":")[0]


async def base_folder(model: str) -> Path:
    """The folder with the weights of a base model: a folder itself, or a model that is downloaded or converted at most once.

    Raises:
        ModelError: it is not to be had.
    """

    def resolve() -> Path:
        return resolve_model(model if folder_at(model) else published_base(model)).folder

    return await anyio.to_thread.run_sync(resolve)


def billing_on(service: ServiceName, model: str | None, price: Price | None = None) -> Billing:
    """How the tokens of a model are billed on a service that need not be open.

    Args:
        service: as :func:`open_service` takes it.
        model: None is the default there.
        price: what the user says that it costs.
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
    """Refuses, before anything is begun or written, a service that :func:`open_service` could not open.

    Downloads or converts the embedded service's model, where that was not done before. Another service is asked what it offers.

    Args:
        trains: the model is to be trained, not only sampled from.
        emit: receives a notice of each wait over 5 seconds.

    Returns:
        The name of the model that will be used.

    Raises:
        ConfigurationError: no service, or no way to it: see :func:`~searchr1_async.endpoint.prepare`.
        ServiceUnavailableError: no answer within 10 s, naming the URL, or none within 30 s about what it offers.
        ModelError: the embedded service's model is not to be had, or the service does not offer the model.
        PortInUseError: the embedded service's port is taken.
    """
    if prepare(service).kind != "embedded":
        return choose_model(model, await _ask(service, trains=trains))[0]
    if local.port:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", local.port))
            except OSError as error:
                raise PortInUseError(
                    f"port {local.port} on 127.0.0.1 cannot be used ({error.strerror}): choose another, or 0 for a free one"
                ) from None
    wanted = model or default_model(service)
    with bounded_wait(f"getting the files of {wanted}", _telling(emit), _DOWNLOAD_DEADLINE):
        await anyio.to_thread.run_sync(resolve_model, wanted, abandon_on_cancel=True)
    return wanted


async def choose_service_model(service: ServiceName, model: str | None) -> tuple[str, str | None]:
    """The model to sample from on a service that is not the embedded one, and what there is to say about the choice.

    Raises:
        ServiceUnavailableError: no answer.
        ModelError: the service does not offer it.
    """
    return choose_model(model, await _ask(service, trains=False))


async def _ask(service: ServiceName, *, trains: bool) -> Offered:
    """What a service that is not embedded offers."""
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
    """Connects, and disconnects at the end. Every service but the embedded one is asked what it offers before.

    Args:
        service: a base URL, ``"embedded"``, or a client of the user's (left open at the end); None takes the service of
            ``TINKER_BASE_URL``, else the cloud where the SDK has credentials, and starts the embedded service otherwise.
        model: None is SmolLM2-135M-Instruct on the embedded service and Qwen3.5-4B elsewhere, or the nearest of its family that
            the service offers, or the only model that it offers.
        folder: where the embedded service keeps its checkpoints and its log.
        tokenizer: a folder or name, where the model's own name does not load one.
        trains: the model is to be trained, not only sampled from.

    Raises:
        ServiceUnavailableError: no answer within 10 s, naming the URL, or none within 30 s about what it offers.
        ServiceStartError, PortInUseError: the embedded service did not come up.
        ModelError: the model or its tokenizer is not to be had.
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
        tell=_telling(emit),
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
        tell=_telling(emit),
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
                tell=_telling(emit),
            )


async def _load_tokenizer(model: str, tokenizer: str | None, emit: Emit) -> Any:
    """The tokenizer of a model as a service calls it, or the one that is named instead.

    The default model of the embedded service is looked for on this machine first: a service of one's own may serve it.
    """

    def source() -> str:
        return tokenizer or str(local_copy(model) or model)

    with bounded_wait(f"loading the tokenizer of {tokenizer or model}", _telling(emit), _DOWNLOAD_DEADLINE):
        return await load_tokenizer(await anyio.to_thread.run_sync(source))


def _telling(emit: Emit) -> Tell:
    return lambda text: emit(Notice(text))


@asynccontextmanager
async def _client(url: str | None, api_key: str | None) -> AsyncIterator[tinker.ServiceClient]:
    try:
        client = tinker.ServiceClient(base_url=url, api_key=api_key)
    except SDK_FAULTS as error:
        raise ConfigurationError(
            f"no Tinker client could be made (is TINKER_API_KEY right?): {fault_text(error)}"
        ) from error
    status = "errored"
    try:
        yield client
        status = "success"
    except BaseException as error:
        status = "errored" if isinstance(error, Exception) else "interrupted"
        raise
    finally:
        # Shielded: the session must be finished in a cancelled run too. Bounded: a dead service must not hold us.
        with anyio.move_on_after(5, shield=True):
            try:
                await anyio.to_thread.run_sync(lambda: client.close(status).result(timeout=4), abandon_on_cancel=True)
            except Exception as error:  # nothing is lost with a session that was not finished in form
                del error


async def check_chat_format(
    service: ServiceName,
    model: str,
    tokenizer: str | None,
    *,
    renderer_name: str | None,
    thinking: Thinking,
) -> None:
    """Refuses a model whose chat format is not known, or that does not have this value of ``thinking``.

    Args:
        model: as :func:`check_service` returned it. Its tokenizer is loaded only where its name does not tell.
        tokenizer: a folder or name to be taken instead of the model's own.

    Raises:
        ModelError: so, or the tokenizer is not to be had.
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
    """The tokenizer that goes with a model of the embedded service, which need not run for it.

    Downloads or converts the model, where that was not done before.

    Args:
        tokenizer: a folder or name to be taken instead; the model's files must be there all the same.

    Raises:
        ModelError: the model or the tokenizer is not to be had.
    """
    files = await anyio.to_thread.run_sync(resolve_model, model)
    return await load_tokenizer(tokenizer or str(files.folder))


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
