"""How a run opens its Tinker service: chosen, checked, connected to, and closed at the end.

Only this module of the engine imports the embedded service, :mod:`searchr1_async.local`, and starts it if it is the chosen one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import tinker

from searchr1_async.billing import Billing, billing_of
from searchr1_async.boundary.network import prepare_proxies
from searchr1_async.boundary.paths import folder_at
from searchr1_async.boundary.sdk import SDK_FAULTS, probe
from searchr1_async.boundary.waits import Notify, bounded_wait
from searchr1_async.config import LocalOptions
from searchr1_async.episodes.rendering import check_thinking, known_format, load_tokenizer, select_renderer
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.local import DEFAULT_MODEL, LocalService, listener_at, local_service
from searchr1_async.local.model_files import ADAPTER_CONFIG as ADAPTER_CONFIG
from searchr1_async.local.model_files import ADAPTER_WEIGHTS as ADAPTER_WEIGHTS
from searchr1_async.local.model_files import IMPORT_ROUTE as IMPORT_ROUTE
from searchr1_async.local.model_files import local_copy, published_name, resolve_model
from searchr1_async.local.model_files import lora_parts as lora_parts
from searchr1_async.models import Price, Thinking, default_cloud_model
from searchr1_async.service.availability import Offered, ask_offered, choose_model, client_refused
from searchr1_async.service.connection import Service, ServiceName, find_endpoint, is_embedded, is_tinker_cloud, prepare

CONNECT_DEADLINE = 10.0
"""Seconds a service has to answer; the SDK alone would retry for minutes."""
_DOWNLOAD_DEADLINE = 6 * 3600.0
"""Seconds to download a model's or tokenizer's files from the hub."""


def default_model(service: ServiceName) -> str:
    """The default model; a service that does not offer it may get another."""
    return DEFAULT_MODEL if is_embedded(service) else default_cloud_model()


async def base_model_of(path: str, service: ServiceName) -> str:
    """The base model of weights under a ``tinker://`` path, on a service other than the embedded one."""
    url = await _reached(service)
    async with nullcontext(service) if isinstance(service, tinker.ServiceClient) else _client(url) as client:
        return (await Service(client, "", None).weights_info(path)).base_model


def published_base(model: str) -> str:
    """A base model's public name: without a suffix such as ``:peft:262144``, and of a folder its last part."""
    return published_name(model).partition(":")[0]


async def base_folder(model: str) -> Path:
    """The folder with a base model's weights, downloaded or converted if needed; :class:`ModelError` if unavailable."""
    return await anyio.to_thread.run_sync(resolve_model, model if folder_at(model) else published_base(model))


def billing_on(service: ServiceName, model: str | None, price: Price | None = None) -> Billing:
    """How a service, which need not be open, bills the tokens of a model (None: its default), perhaps at the user's price."""
    name = model or default_model(service)
    return billing_of(name, is_embedded=is_embedded(service), is_tinker=is_tinker_cloud(service), price=price)


async def check_service(
    service: ServiceName, model: str | None, local: LocalOptions, *, trains: bool = False, emit: Emit = emit_nothing
) -> str:
    """Refuses a service that :func:`open_service` could not open, before any work starts or anything is written.

    Downloads or converts the embedded service's model if needed; asks other services which models they offer.

    Returns:
        The name of the model that will be used (``trains``: trained, not only sampled from).

    Raises:
        ConfigurationError, ServiceUnavailableError, ModelError, PortInUseError: see :func:`open_service`.
    """
    if prepare(service).kind != "embedded":
        return choose_model(model, await _offered(service, trains=trains))[0]
    if local.port:
        listener_at(local.port).close()
    wanted = model or default_model(service)
    with bounded_wait(f"getting the files of {wanted}", _notifier(emit), _DOWNLOAD_DEADLINE):
        await anyio.to_thread.run_sync(resolve_model, wanted, abandon_on_cancel=True)
    return wanted


async def choose_service_model(service: ServiceName) -> tuple[str, str | None]:
    """The default model to sample from on a service other than the embedded one, and a note on the choice, if any."""
    return choose_model(None, await _offered(service, trains=False))


async def _offered(service: ServiceName, *, trains: bool) -> Offered:
    """What a service other than the embedded one offers."""
    url = await _reached(service)
    if isinstance(service, tinker.ServiceClient):
        return await ask_offered(lambda: tinker.RestClient(service.holder), trains=trains)
    return await ask_offered(lambda: tinker.RestClient(base_url=url), trains=trains)


async def _reached(service: ServiceName) -> str | None:
    """The URL of a service other than the embedded one, which has answered; None for the cloud."""
    url = prepare(service).url
    if url is not None and not isinstance(service, tinker.ServiceClient):
        await probe(url, timeout=CONNECT_DEADLINE)
    return url


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
        model: None: SmolLM2-135M-Instruct on the embedded service; elsewhere see :func:`choose_model`.
        folder: for the embedded service's checkpoints and log.
        tokenizer: a folder or name, if the model's name does not load one.
        trains: the model will be trained, not only sampled from.

    Raises:
        ConfigurationError: no usable service.
        ServiceUnavailableError: no answer within 10 s, or no list of models within 30 s.
        ServiceStartError, PortInUseError: the embedded service did not start.
        ModelError: the model or its tokenizer is not available.
    """
    async with AsyncExitStack() as stack:
        if prepare(service).kind == "embedded":
            started = await stack.enter_async_context(_started(model or DEFAULT_MODEL, folder, local, emit))
            connect = partial(_client, started.url, started.api_key)
            found: dict[str, Any] = {"model_name": started.model_name, "model_folder": Path(started.tokenizer_path)}
            loaded = await load_tokenizer_of(started.tokenizer_path, tokenizer, emit)
        else:
            offered = await _offered(service, trains=trains)
            name, note = choose_model(model, offered)
            if note is not None:
                emit(Notice(note))
            connect = (
                None if isinstance(service, tinker.ServiceClient) else partial(_client, find_endpoint(service).url)
            )
            found = {"model_name": name, "is_tinker": is_tinker_cloud(service), "offered": offered}
            loaded = await load_tokenizer_of(name, tokenizer, emit)
        client: Any = service if connect is None else await stack.enter_async_context(connect())
        yield Service(client, tokenizer=loaded, connect=connect, notify=_notifier(emit), **found)


@asynccontextmanager
async def _started(model: str, folder: Path, local: LocalOptions, emit: Emit) -> AsyncIterator[LocalService]:
    """The embedded service, started here."""
    emit(Notice(f"starting the embedded service with {model} on this machine"))
    options = asdict(local)
    memory_gb = options.pop("memory_gb")
    options["backend_options"] = {} if memory_gb is None else {"memory_bytes": int(memory_gb * 1e9)}
    log, notify = folder / "service.log", _notifier(emit)
    async with local_service(model, folder=folder, log_path=log, notify=notify, **options) as started:
        emit(Notice(f"the embedded service answers at {started.url} (pid {started.pid})"))
        prepare_proxies(started.url)
        yield started


async def load_tokenizer_of(model: str, tokenizer: str | None, emit: Emit = emit_nothing) -> Any:
    """The tokenizer of a model, or the named one (a folder or name). Raises ModelError.

    A local copy goes first: another service may serve the embedded default model.
    """
    with bounded_wait(f"loading the tokenizer of {tokenizer or model}", _notifier(emit), _DOWNLOAD_DEADLINE):
        source = tokenizer or await anyio.to_thread.run_sync(lambda: str(local_copy(model) or model))
        return await load_tokenizer(source)


def _notifier(emit: Emit) -> Notify:
    return lambda text: emit(Notice(text))


@asynccontextmanager
async def _client(url: str | None, api_key: str | None = None) -> AsyncIterator[tinker.ServiceClient]:
    try:
        client = tinker.ServiceClient(base_url=url, api_key=api_key)
    except SDK_FAULTS as error:
        raise client_refused(error) from error
    status = "errored"
    try:
        yield client
        status = "success"
    except BaseException as error:
        status = "errored" if isinstance(error, Exception) else "interrupted"
        raise
    finally:
        # Shielded: close the session of a cancelled run too. Bounded: a dead service must not block the exit.
        with anyio.move_on_after(5, shield=True), suppress(Exception):  # an unclosed session loses nothing
            await anyio.to_thread.run_sync(lambda: client.close(status).result(timeout=4), abandon_on_cancel=True)


async def check_chat_format(
    model: str, tokenizer: str | None, *, renderer_name: str | None, thinking: Thinking
) -> None:
    """Refuses a model with an unknown chat format, an unsupported ``thinking`` or no tokenizer. Raises ModelError.

    The tokenizer is loaded only if the model's name, from :func:`check_service`, does not tell the format.
    """
    check_thinking(model, renderer_name, thinking)
    if known_format(model, renderer_name) is None:
        loaded = await load_tokenizer_of(model, tokenizer)
        await anyio.to_thread.run_sync(select_renderer, model, loaded, renderer_name, thinking)
