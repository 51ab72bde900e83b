"""A connected Tinker service: training clients, sampling clients and checkpoints, each call with a deadline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import tinker
from tinker.types import ExternalWeightsUrlsResponse, WeightsInfoResponse

from searchr1_async.boundary.network import SDK_FAULTS, fault_text
from searchr1_async.boundary.waits import PausableDeadlines, Tell, bounded_wait, say_nothing
from searchr1_async.endpoint import address_of
from searchr1_async.errors import ServiceError
from searchr1_async.offered import Offered
from searchr1_async.reachability import ServiceWatch

_SETUP_DEADLINE = 300.0
"""Seconds for creating a session, a training client or a sampling client."""
_EXTERNAL_DEADLINE = 1800.0
"""Seconds for saving external weights: a large model's adapter is gigabytes."""


@dataclass(frozen=True, slots=True)
class Service:
    """A connected Tinker service and the model used on it. A refused or unanswered call raises :class:`ServiceError`."""

    client: tinker.ServiceClient
    model_name: str
    tokenizer: Any
    """The model's Hugging Face tokenizer."""
    is_local: bool
    """The embedded service, started by this process."""
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
    tell: Tell = field(default=say_nothing, repr=False)
    """Called with a sentence for each wait over 5 seconds."""

    @property
    def url(self) -> str:
        """Base URL."""
        return address_of(self.client)

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
        return await self._wait(
            "creating a training client",
            lambda: self.client.create_lora_training_client(self.model_name, rank=rank, seed=seed),
        )

    async def restore_training_client(self, state_path: str) -> tinker.TrainingClient:
        """A training client with the weights and optimiser state saved under a ``tinker://`` path."""
        return await self._wait(
            f"restoring {state_path}",
            lambda: self.client.create_training_client_from_state_with_optimizer(state_path),
        )

    async def load_weights(self, state_path: str) -> tinker.TrainingClient:
        """A training client with the weights saved under a ``tinker://…/weights/…`` path and a new optimizer."""
        return await self._wait(
            f"loading {state_path}", lambda: self.client.create_training_client_from_state(state_path)
        )

    async def save_external(self, client: tinker.TrainingClient, name: str, *, ttl_seconds: int) -> str:
        """Saves a model's adapter for download; returns its ``tinker://…/external_weights/…`` path. Older services lack it.

        Args:
            ttl_seconds: time to live; Tinker's minimum is 3,600.
        """
        saved = await self._wait(
            "saving external weights",
            lambda: client.save_weights_external(name, ttl_seconds=ttl_seconds),
            deadline=_EXTERNAL_DEADLINE,
        )
        return saved.path

    async def external_urls(self, path: str) -> ExternalWeightsUrlsResponse:
        """Signed URLs of the files of external weights."""
        rest = await self._rest()
        return await self._wait(f"asking for the files of {path}", lambda: rest.get_external_weights_urls(path))

    async def weights_info(self, path: str) -> WeightsInfoResponse:
        """The base model and the LoRA rank of saved weights."""
        rest = await self._rest()
        return await self._wait(f"asking about {path}", lambda: rest.get_weights_info_by_tinker_path(path))

    async def create_sampling_client(
        self, sampler_path: str | None = None, *, base_model: str | None = None
    ) -> tinker.SamplingClient:
        """A sampling client for saved weights or a base model (default: this service's)."""
        if sampler_path is not None:
            return await self._wait(
                f"opening {sampler_path}", lambda: self.client.create_sampling_client(model_path=sampler_path)
            )
        model = base_model or self.model_name
        return await self._wait(f"opening {model}", lambda: self.client.create_sampling_client(base_model=model))

    async def delete_checkpoint(self, path: str) -> None:
        rest = await self._rest()
        await self._wait(f"deleting {path}", lambda: rest.delete_checkpoint_from_tinker_path(path))

    async def _wait(self, doing: str, submit: Callable[[], Any], deadline: float = _SETUP_DEADLINE) -> Any:
        return await wait_for(doing, submit, deadline, self.tell, None if self.watch is None else self.watch.deadlines)

    async def _rest(self) -> tinker.RestClient:
        # On the session's connections, which close with it; the first use of an address blocks.
        return await anyio.to_thread.run_sync(lambda: tinker.RestClient(self.client.holder))


async def wait_for(
    doing: str,
    submit: Callable[[], Any],
    deadline: float = _SETUP_DEADLINE,
    tell: Tell = say_nothing,
    deadlines: PausableDeadlines | None = None,
) -> Any:
    """Runs an SDK call that may block (the first one opens the session) and waits for its result.

    Args:
        doing: for messages.
        deadline: seconds, which stand still while ``deadlines`` are paused.
        tell: called with a sentence if the wait is over 5 seconds.

    Raises:
        ServiceError: refused, or no answer.
    """
    try:
        with bounded_wait(f"{doing}: the Tinker service has not answered yet", tell, deadline, deadlines):
            future = await anyio.to_thread.run_sync(submit, abandon_on_cancel=True)
            return await future
    except TimeoutError as error:
        raise ServiceError(f"{doing}: the Tinker service did not answer within {deadline:g} s") from error
    except SDK_FAULTS as error:
        raise ServiceError(f"{doing} failed at the Tinker service: {fault_text(error)}") from error
