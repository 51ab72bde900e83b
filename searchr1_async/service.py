"""The way to a Tinker service: the one asked for, the cloud where a key is set, else the embedded one, started here."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import tinker
from tinker.types import ExternalWeightsUrlsResponse, WeightsInfoResponse

from searchr1_async.billing import Billing, billing_of, is_tinker_host
from searchr1_async.config import LocalOptions
from searchr1_async.episodes.rendering import check_thinking, known_format, select_renderer
from searchr1_async.episodes.tokenizers import load_tokenizer
from searchr1_async.errors import ConfigurationError, PortInUseError, ServiceError, ServiceUnavailableError
from searchr1_async.events import Emit, Notice
from searchr1_async.local import DEFAULT_MODEL, local_service, probe
from searchr1_async.local.models import published_name, resolve_model
from searchr1_async.local.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, IMPORT_ROUTE, lora_parts
from searchr1_async.models import Price, Thinking, default_cloud_model
from searchr1_async.offered import Offered, ask_offered, choose_model

CONNECT_DEADLINE = 10.0
"""Seconds in which a service must answer; the SDK itself would try for minutes."""
_SETUP_DEADLINE = 300.0
"""Seconds for creating a session, a training client or a sampling client."""
_EXTERNAL_DEADLINE = 1800.0
"""Seconds for saving external weights: a large model's adapter is some gigabytes."""


@dataclass(frozen=True, slots=True)
class Service:
    """A connected Tinker service and the model used on it."""

    client: tinker.ServiceClient
    model_name: str
    tokenizer: Any
    """The model's Hugging Face tokenizer."""
    is_local: bool
    """The embedded one, started here."""
    is_tinker: bool = False
    """Tinker's own cloud, as far as its address tells."""
    offered: Offered = None
    """The models that it lists; None where it has no list."""
    model_folder: Path | None = None
    """Where the weights of the embedded service's model are; None elsewhere."""
    connect: Callable[[], AbstractAsyncContextManager[tinker.ServiceClient]] | None = field(default=None, repr=False)
    """Opens another session; None where the client is the user's own."""

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Service]:
        """The same service in a session of its own: the models that are opened in it are gone when the block ends."""
        if self.connect is None:
            yield self
            return
        async with self.connect() as client:
            yield replace(self, client=client)

    async def create_training_client(self, *, rank: int, seed: int) -> tinker.TrainingClient:
        """A new LoRA adapter.

        Raises:
            ServiceError: refused, or no answer.
        """
        return await wait_for(
            "creating a training client",
            lambda: self.client.create_lora_training_client(self.model_name, rank=rank, seed=seed),
        )

    async def restore_training_client(self, state_path: str) -> tinker.TrainingClient:
        """The weights and the optimiser saved under a ``tinker://`` path.

        Raises:
            ServiceError: it is gone (expired, another folder), or no answer.
        """
        return await wait_for(
            f"restoring {state_path}",
            lambda: self.client.create_training_client_from_state_with_optimizer(state_path),
        )

    async def load_weights(self, state_path: str) -> tinker.TrainingClient:
        """A training client with the weights saved under a ``tinker://…/weights/…`` path and a new optimizer.

        Raises:
            ServiceError: they are gone (expired, another folder), or no answer.
        """
        return await wait_for(
            f"loading {state_path}", lambda: self.client.create_training_client_from_state(state_path)
        )

    async def save_external(self, client: tinker.TrainingClient, name: str, *, ttl_seconds: int) -> str:
        """Saves a model's adapter for download; returns its ``tinker://…/external_weights/…`` path.

        Args:
            ttl_seconds: after which the service deletes it; Tinker takes 3,600 or more.

        Raises:
            ServiceError: refused (an older service does not offer it), or no answer.
        """
        saved = await wait_for(
            "saving external weights",
            lambda: client.save_weights_external(name, ttl_seconds=ttl_seconds),
            deadline=_EXTERNAL_DEADLINE,
        )
        return saved.path

    async def external_urls(self, path: str) -> ExternalWeightsUrlsResponse:
        """Signed URLs of the files of external weights.

        Raises:
            ServiceError: there are none, or no answer.
        """
        rest = await self._rest()
        return await wait_for(f"asking for the files of {path}", lambda: rest.get_external_weights_urls(path))

    async def weights_info(self, path: str) -> WeightsInfoResponse:
        """The base model and the LoRA rank of saved weights.

        Raises:
            ServiceError: there are none, or no answer.
        """
        rest = await self._rest()
        return await wait_for(f"asking about {path}", lambda: rest.get_weights_info_by_tinker_path(path))

    async def create_sampling_client(
        self, sampler_path: str | None = None, *, base_model: str | None = None
    ) -> tinker.SamplingClient:
        """Over saved weights, or over a base model: this service's, or another that it serves.

        Raises:
            ServiceError: refused, or no answer.
        """
        if sampler_path is not None:
            return await wait_for(
                f"opening {sampler_path}", lambda: self.client.create_sampling_client(model_path=sampler_path)
            )
        model = base_model or self.model_name
        return await wait_for(f"opening {model}", lambda: self.client.create_sampling_client(base_model=model))

    async def delete_checkpoint(self, path: str) -> None:
        """Deletes a checkpoint that is no longer needed.

        Raises:
            ServiceError: it could not be deleted.
        """
        rest = await self._rest()
        await wait_for(f"deleting {path}", lambda: rest.delete_checkpoint_from_tinker_path(path))

    async def _rest(self) -> tinker.RestClient:
        # Over the session's own connections, which are closed with it; its first use of an address blocks.
        return await anyio.to_thread.run_sync(lambda: tinker.RestClient(self.client.holder))


async def wait_for(doing: str, submit: Callable[[], Any], deadline: float = _SETUP_DEADLINE) -> Any:
    """Runs a call of the SDK that may block (it starts its session at the first) and waits ``deadline`` seconds for its result.

    Raises:
        ServiceError: refused, or no answer; ``doing`` says what was being done.
    """
    try:
        with anyio.fail_after(deadline):
            future = await anyio.to_thread.run_sync(submit, abandon_on_cancel=True)
            return await future
    except TimeoutError as error:
        raise ServiceError(f"{doing}: the Tinker service did not answer within {deadline:g} s") from error
    except (tinker.TinkerError, ValueError) as error:
        raise ServiceError(f"{doing} failed at the Tinker service: {type(error).__name__}: {error}") from error


def is_embedded(service: str | tinker.ServiceClient | None) -> bool:
    """Whether the embedded service would be started: no service is named, and no Tinker endpoint is set."""
    return service is None and not os.environ.get("TINKER_API_KEY") and not os.environ.get("TINKER_BASE_URL")


def default_model(service: str | tinker.ServiceClient | None) -> str:
    """The model that is meant where none is named; a service that does not offer it may have another used in its place."""
    return DEFAULT_MODEL if is_embedded(service) else default_cloud_model()


async def base_model_of(path: str, service: str | tinker.ServiceClient | None) -> str:
    """The base model of weights under a ``tinker://`` path of a service that is not the embedded one.

    Raises:
        ServiceError: there are no such weights, or no answer.
    """
    if isinstance(service, tinker.ServiceClient):
        return (await Service(service, "", None, is_local=False).weights_info(path)).base_model
    url = service or os.environ.get("TINKER_BASE_URL")
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
        is_folder = Path(model).expanduser().is_dir()
        return resolve_model(model if is_folder else published_base(model)).folder

    return await anyio.to_thread.run_sync(resolve)


def is_tinker_cloud(service: str | tinker.ServiceClient | None) -> bool:
    """Whether a service that is not the embedded one is Tinker's cloud, as far as its address tells."""
    if isinstance(service, tinker.ServiceClient):
        url = service.holder.shadow_config.base_url
    else:
        url = service or os.environ.get("TINKER_BASE_URL")
    return is_tinker_host(None if url is None else urlsplit(url).hostname or "")


def billing_on(service: str | tinker.ServiceClient | None, model: str | None, price: Price | None = None) -> Billing:
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
    service: str | tinker.ServiceClient | None, model: str | None, local: LocalOptions, *, trains: bool = False
) -> str:
    """Refuses, before anything is begun or written, a service that :func:`open_service` could not open.

    Downloads or converts the embedded service's model, where that was not done before. Another service is asked what it offers.

    Args:
        trains: the model is to be trained, not only sampled from.

    Returns:
        The name of the model that will be used.

    Raises:
        ServiceUnavailableError: no answer within 10 s, naming the URL, or none within 30 s about what it offers.
        ModelError: the embedded service's model is not to be had, or the service does not offer the model.
        PortInUseError: the embedded service's port is taken.
    """
    if not is_embedded(service):
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
    await anyio.to_thread.run_sync(resolve_model, wanted)
    return wanted


async def choose_service_model(service: str | tinker.ServiceClient | None, model: str | None) -> tuple[str, str | None]:
    """The model to sample from on a service that is not the embedded one, and what there is to say about the choice.

    Raises:
        ServiceUnavailableError: no answer.
        ModelError: the service does not offer it.
    """
    return choose_model(model, await _ask(service, trains=False))


async def _ask(service: str | tinker.ServiceClient | None, *, trains: bool) -> Offered:
    """What a service that is not embedded offers."""
    if isinstance(service, tinker.ServiceClient):
        return await ask_offered(lambda: tinker.RestClient(service.holder), trains=trains)
    url = service or os.environ.get("TINKER_BASE_URL")
    if url is not None:
        await probe(url, timeout=CONNECT_DEADLINE)
    return await ask_offered(lambda: tinker.RestClient(base_url=url), trains=trains)


@asynccontextmanager
async def open_service(
    service: str | tinker.ServiceClient | None,
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
        service: a base URL, or a client of the user's (left open at the end); None takes the cloud where ``TINKER_API_KEY``
            or ``TINKER_BASE_URL`` is set, and starts the embedded service otherwise.
        model: None is SmolLM2-135M-Instruct on the embedded service and Qwen3.5-4B elsewhere, or the nearest of its family that
            the service offers.
        folder: where the embedded service keeps its checkpoints and its log.
        tokenizer: a folder or name, where the model's own name does not load one.
        trains: the model is to be trained, not only sampled from.

    Raises:
        ServiceUnavailableError: no answer within 10 s, naming the URL, or none within 30 s about what it offers.
        ServiceStartError, PortInUseError: the embedded service did not come up.
        ModelError: the model or its tokenizer is not to be had.
    """
    if not is_embedded(service):
        offered = await _ask(service, trains=trains)
        name, note = choose_model(model, offered)
        if note is not None:
            emit(Notice(note))
        loaded = await load_tokenizer(tokenizer or name)
        if isinstance(service, tinker.ServiceClient):
            yield Service(service, name, loaded, is_local=False, is_tinker=is_tinker_cloud(service), offered=offered)
            return
        url = service or os.environ.get("TINKER_BASE_URL")
        async with _client(url, None) as client:
            yield Service(
                client,
                name,
                loaded,
                is_local=False,
                is_tinker=is_tinker_cloud(url),
                offered=offered,
                connect=lambda: _client(url, None),
            )
        return
    wanted = model or default_model(service)
    emit(Notice(f"no Tinker endpoint is set: starting the embedded service with {wanted} on this machine"))
    async with local_service(
        wanted,
        folder=folder,
        port=local.port,
        threads=local.threads,
        dtype=local.dtype,
        device=local.device,
        start_timeout=local.start_timeout,
        log_path=folder / "service.log",
    ) as started:
        emit(Notice(f"the embedded service answers at {started.url} (pid {started.pid})"))
        async with _client(started.url, started.api_key) as client:
            loaded = await load_tokenizer(tokenizer or started.tokenizer_path)
            yield Service(
                client,
                started.model_name,
                loaded,
                is_local=True,
                model_folder=Path(started.tokenizer_path),
                connect=lambda: _client(started.url, started.api_key),
            )


@asynccontextmanager
async def _client(url: str | None, api_key: str | None) -> AsyncIterator[tinker.ServiceClient]:
    try:
        client = tinker.ServiceClient(base_url=url, api_key=api_key)
    except tinker.TinkerError as error:
        raise ConfigurationError(f"no Tinker client could be made (is TINKER_API_KEY right?): {error}") from error
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
    service: str | tinker.ServiceClient | None,
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
        load = load_embedded_tokenizer(model, tokenizer) if is_embedded(service) else load_tokenizer(tokenizer or model)
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
    "Service",
    "ServiceUnavailableError",
    "base_folder",
    "base_model_of",
    "check_chat_format",
    "check_service",
    "choose_service_model",
    "is_embedded",
    "is_tinker_cloud",
    "load_embedded_tokenizer",
    "lora_parts",
    "open_service",
    "published_base",
    "wait_for",
]
