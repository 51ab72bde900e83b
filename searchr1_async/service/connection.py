"""A connected Tinker service: training clients, sampling clients and checkpoints, each call with a deadline.

The ``service`` argument names the service; without one it is the one the SDK has credentials for, else the embedded one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import anyio
import tinker
from tinker.types import ExternalWeightsUrlsResponse, WeightsInfoResponse

from searchr1_async.billing import is_tinker_host
from searchr1_async.boundary import compat
from searchr1_async.boundary.network import checked_url, prepare_proxies
from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text
from searchr1_async.boundary.settings import shown_with_kind
from searchr1_async.boundary.waits import Notify, PausableDeadlines, bounded_wait, notify_nobody
from searchr1_async.errors import ConfigurationError, SearchR1Error, ServiceError
from searchr1_async.service.availability import Offered, ServiceWatch

EMBEDDED = "embedded"
"""Value of ``service=`` for the embedded service, regardless of credentials."""

ServiceName = str | tinker.ServiceClient | None
"""The argument ``service``: a base URL, ``"embedded"``, a client, or None to use the environment."""
_SETUP_DEADLINE = 300.0
"""Seconds for creating a session, a training client or a sampling client."""
_EXTERNAL_DEADLINE = 1800.0
"""Seconds for saving external weights: a large model's adapter is gigabytes."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A Tinker service, not yet opened."""

    kind: Literal["embedded", "url", "cloud", "client"]
    text: str
    """Which service is used and why: the first line of a run."""
    url: str | None = None
    """Base URL; None for the embedded service and for the cloud, whose URL the SDK knows."""


def find_endpoint(service: ServiceName) -> Endpoint:
    """Resolves the argument ``service`` in this environment. Opens nothing. Raises ConfigurationError."""
    if isinstance(service, tinker.ServiceClient):
        url = compat.address_of(service)
        return Endpoint("client", f"using the Tinker service of the given client, {url}: service=… gives it", url)
    embedded = "using the embedded Tinker service on this machine"
    if service == EMBEDDED:
        return Endpoint("embedded", f"{embedded}: service={EMBEDDED!r} names it")
    if service is not None and not isinstance(service, str):
        raise ConfigurationError(
            f"service is {shown_with_kind(service)}: pass a URL, {EMBEDDED!r} or a tinker.ServiceClient"
        )
    name = "TINKER_BASE_URL" if service is None else "service"
    given = service if service is not None else os.environ.get(name) or None
    if given is not None:
        url = checked_url(given, name)
        _check_key()
        return Endpoint("url", f"using the Tinker service at {url}: {name} names it", url)
    if (source := credentials_source()) is not None:
        _check_key()
        return Endpoint("cloud", f"using Tinker's cloud: {source}, and no other service is named")
    credentials = "TINKER_API_KEY, TINKER_CREDENTIAL_CMD or tinker auth login"
    return Endpoint(
        "embedded", f"{embedded}: no service is named, and the Tinker SDK has no credentials ({credentials})"
    )


def credentials_source() -> str | None:
    """Where the SDK finds its credentials, as text; None if it has none. Refuses unreadable credentials."""
    if os.environ.get("TINKER_API_KEY"):
        return "TINKER_API_KEY is set"
    try:
        if not compat.has_stored_credentials():
            return None
    except (ValueError, OSError) as error:
        raise ConfigurationError(
            f"cannot read the credentials stored by `tinker auth login` ({type(error).__name__}): log in again, set "
            f"TINKER_API_KEY, or pass service={EMBEDDED!r} for the embedded service"
        ) from error
    if os.environ.get("TINKER_CREDENTIAL_CMD"):
        return "TINKER_CREDENTIAL_CMD is set"
    return "tinker auth login has stored a key"


def is_embedded(service: ServiceName) -> bool:
    """Whether this is the embedded service."""
    return find_endpoint(service).kind == "embedded"


def is_tinker_cloud(service: ServiceName) -> bool:
    """Whether a service is Tinker's cloud, judging by its address."""
    endpoint = find_endpoint(service)
    return endpoint.kind == "cloud" or is_tinker_host(urlsplit(endpoint.url or "").hostname or "")


def prepare(service: ServiceName) -> Endpoint:
    """Resolves the endpoint and prepares the environment's proxies for it."""
    endpoint = find_endpoint(service)
    prepare_proxies(endpoint.url or ("http://127.0.0.1" if endpoint.kind == "embedded" else compat.address_of(None)))
    return endpoint


def _check_key() -> None:
    """Refuses a key that cannot be sent in an HTTP header, which the SDK would retry for a minute."""
    key = os.environ.get("TINKER_API_KEY", "")
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise ConfigurationError(
            "TINKER_API_KEY contains a space, a line break or a character that keys never have: set it to the key alone"
        )


@dataclass(frozen=True, slots=True)
class Service:
    """A connected Tinker service and the model used on it. A refused or unanswered call raises :class:`ServiceError`."""

    client: tinker.ServiceClient
    model_name: str
    tokenizer: Any
    """The model's Hugging Face tokenizer."""
    is_tinker: bool = False
    """Tinker's own cloud, judging by the address."""
    offered: Offered = None
    """The models it lists; None if it has no list."""
    model_folder: Path | None = None
    """Folder of the embedded service's model weights; None elsewhere."""
    connect: Callable[[], AbstractAsyncContextManager[tinker.ServiceClient]] | None = field(default=None, repr=False)
    """Opens another session; None for the user's own client."""
    watch: ServiceWatch | None = field(default=None, repr=False)
    """Detects outages while work uses the service."""
    notify: Notify = field(default=notify_nobody, repr=False)
    """Called with a sentence for each wait over 5 seconds."""

    @property
    def is_local(self) -> bool:
        """The embedded service, started by this process."""
        return self.model_folder is not None

    @property
    def url(self) -> str:
        """Base URL."""
        return compat.address_of(self.client)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Service]:
        """The same service in a separate session, whose models are freed at the end."""
        if self.connect is None:
            yield self
            return
        async with self.connect() as client:
            yield replace(self, client=client)

    async def create_training_client(self, *, rank: int, seed: int) -> tinker.TrainingClient:
        """Creates a new LoRA adapter."""
        create = partial(self.client.create_lora_training_client, self.model_name, rank=rank, seed=seed)
        return await self._wait("creating a training client", create)

    async def restore_training_client(self, state_path: str) -> tinker.TrainingClient:
        """A training client with the weights and optimizer state saved under a ``tinker://`` path."""
        create = self.client.create_training_client_from_state_with_optimizer
        return await self._wait(f"restoring {state_path}", partial(create, state_path))

    async def load_weights(self, state_path: str) -> tinker.TrainingClient:
        """A training client with the weights saved under a ``tinker://…/weights/…`` path and a new optimizer."""
        create = self.client.create_training_client_from_state
        return await self._wait(f"loading {state_path}", partial(create, state_path))

    async def save_external(self, client: tinker.TrainingClient, name: str, *, ttl_seconds: int) -> str:
        """Saves a model's adapter for download; returns its ``tinker://…/external_weights/…`` path. Older services lack it.

        Args:
            ttl_seconds: time to live; Tinker's minimum is 3,600.
        """
        save = partial(client.save_weights_external, name, ttl_seconds=ttl_seconds)
        return (await self._wait("saving external weights", save, deadline=_EXTERNAL_DEADLINE)).path

    async def external_urls(self, path: str) -> ExternalWeightsUrlsResponse:
        """Signed URLs of the files of external weights."""
        return await self._ask(f"asking for the files of {path}", lambda rest: rest.get_external_weights_urls(path))

    async def weights_info(self, path: str) -> WeightsInfoResponse:
        """The base model and the LoRA rank of saved weights."""
        return await self._ask(f"asking about {path}", lambda rest: rest.get_weights_info_by_tinker_path(path))

    async def delete_checkpoint(self, path: str) -> None:
        await self._ask(f"deleting {path}", lambda rest: rest.delete_checkpoint_from_tinker_path(path))

    async def create_sampling_client(
        self, sampler_path: str | None = None, *, base_model: str | None = None
    ) -> tinker.SamplingClient:
        """A sampling client for saved weights or a base model (default: this service's)."""
        model = None if sampler_path else base_model or self.model_name
        create = partial(self.client.create_sampling_client, model_path=sampler_path, base_model=model)
        return await self._wait(f"opening {sampler_path or model}", create)

    async def _wait(self, doing: str, submit: Callable[[], Any], deadline: float = _SETUP_DEADLINE) -> Any:
        return await wait_for(doing, submit, deadline, self.notify, self.watch and self.watch.deadlines)

    async def _ask(self, doing: str, ask: Callable[[tinker.RestClient], Any]) -> Any:
        # On the session's connections, which close with it; the first use of an address blocks.
        return await self._wait(doing, lambda: ask(tinker.RestClient(self.client.holder)))


async def wait_for(
    doing: str,
    submit: Callable[[], Any],
    deadline: float = _SETUP_DEADLINE,
    notify: Notify = notify_nobody,
    deadlines: PausableDeadlines | None = None,
) -> Any:
    """Runs an SDK call that may block (the first one opens the session) and waits for its result.

    Args:
        deadline: seconds, which stand still while ``deadlines`` are paused.
        notify: called with a sentence if the wait is over 5 seconds.

    Raises:
        ServiceError: refused, or no answer.
    """
    try:
        with bounded_wait(f"{doing}: the Tinker service has not answered yet", notify, deadline, deadlines):
            return await (await anyio.to_thread.run_sync(submit, abandon_on_cancel=True))
    except TimeoutError as error:
        raise ServiceError(f"{doing}: the Tinker service did not answer within {deadline:g} s") from error
    except SDK_FAULTS as error:
        raise ServiceError(f"{doing} failed at the Tinker service: {fault_text(error)}") from error


class TrainingCalls:
    """Errors of training calls, and their deadline, which stops while the run is paused.

    Args:
        deadline: seconds for all training calls of one step, after which the service counts as dead.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._deadlines = PausableDeadlines()
        self.pause = self._deadlines.pause
        """Called with True or False, pauses or resumes the deadlines of pending calls."""

    @contextmanager
    def waiting(self, doing: str, error: type[SearchR1Error] = ServiceError) -> Iterator[None]:
        """A block that waits for the service; raises ``error`` on failure or timeout."""
        try:
            with self._deadlines.limit(self.deadline) as scope:
                yield
        except SearchR1Error:
            raise
        except SDK_FAULTS as fault:
            raise error(f"{doing} failed at the Tinker service: {fault_text(fault)}") from fault
        if scope.cancelled_caught:
            raise error(
                f"{doing} took over {self.deadline:g} s at the Tinker service: if it is only slow, or paused for capacity, raise "
                "training_deadline"
            )


async def until_done(future: tinker.APIFuture[Any]) -> None:
    """Waits without awaiting the future, which would cancel the call with the wait, and raise its error here."""
    done = asyncio.Event()
    when_done(future, done.set, also_failed=True)
    await done.wait()


def when_done(future: tinker.APIFuture[Any], notify: Callable[[], None], *, also_failed: bool = False) -> None:
    """Calls ``notify`` in this event loop when the SDK call ends, unless the loop is closed."""
    loop = asyncio.get_running_loop()

    def ended(inner: concurrent.futures.Future[Any]) -> None:
        if also_failed or not (inner.cancelled() or inner.exception()):
            with suppress(RuntimeError):  # closed
                loop.call_soon_threadsafe(notify)

    future.future().add_done_callback(ended)
