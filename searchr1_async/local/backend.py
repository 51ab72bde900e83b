"""The interface between the embedded Tinker service and a model.

The server (:mod:`searchr1_async.local.server`) handles the wire protocol, ordering, idempotency and checkpoints; a
:class:`Backend` computes: :class:`~searchr1_async.local.torch_backend.TorchBackend` runs a real language model,
:class:`~searchr1_async.local.scripted.ScriptedBackend` a function of the prompt with modelled latency.

Methods return immediately; work runs on the backend's own thread and resolves a :class:`concurrent.futures.Future`.
Calls on one :class:`Adapter` run in submission order. A bad request fails its future with :class:`UserFault`; any other
exception is the server's fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]


class UserFault(Exception):
    """The request is invalid; the message goes to the client (category ``user``)."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Tinker's ``lora_config``."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True, slots=True)
class AdamParams:
    """Tinker's ``adam_params``. ``grad_clip_norm`` is a global norm; 0 disables clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One ``asample``: ``num_samples`` continuations of one prompt."""

    prompt: Int32Array
    """Token ids, shape [P], P >= 1."""
    num_samples: int = 1
    max_tokens: int | None = None
    """Maximum new tokens; None: up to the model's context length."""
    temperature: float = 1.0
    """0 is greedy. Returned log-probabilities are always at temperature 1, as Tinker's are."""
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop_tokens: tuple[int, ...] | None = None
    """None: the model's own end-of-text tokens. Empty: never stop early."""
    stop_strings: tuple[str, ...] = ()
    """Generation stops after the token whose text completes one of these; that token is kept."""
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class SampledSequence:
    tokens: Int32Array
    """Shape [N], including the stop token."""
    logprobs: Float32Array
    """Shape [N]."""
    stop_reason: Literal["stop", "length"]
    topk: tuple[Int32Array, Float32Array] | None = None
    """Ids and log-probabilities, each [N, k]."""


@dataclass(frozen=True, slots=True)
class SampleResult:
    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: Float32Array | None = None
    """Shape [P], NaN first."""
    topk_prompt: tuple[Int32Array, Float32Array] | None = None
    """Ids and log-probabilities, each [P, k]; row 0 is (0, NaN)."""
    prompt_cache_hit_tokens: int = 0
    """Prompt tokens found in the prefix cache, counted once regardless of ``num_samples``."""


@dataclass(frozen=True, slots=True)
class Datum:
    """One training example: T input tokens and per-token loss inputs."""

    tokens: Int32Array
    """Model input, shape [T]."""
    loss_inputs: Mapping[str, NDArray[Any]]
    """``target_tokens`` int64 [T]; ``weights`` f32 [T] for cross_entropy; ``logprobs`` and ``advantages`` f32 [T] for the RL losses."""


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    logprobs: tuple[Float32Array, ...]
    """Target log-probabilities [T] per datum."""
    metrics: Mapping[str, float]
    """Names include Tinker's reduction suffix: ``loss:sum``, …"""


class Adapter(Protocol):
    """A trainable LoRA adapter with optimizer state and gradients; opaque to the server."""

    @property
    def lora(self) -> LoraConfig: ...


class Snapshot(Protocol):
    """Immutable sampler weights; opaque to the server, freed when unreferenced."""


class InflightTarget(Protocol):
    """Weights shared by all in-flight sampling clients of one model; replaced by each save."""

    @property
    def snapshot(self) -> Snapshot | None:
        """The latest weights; never None while a sample runs."""
        ...


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class InflightClient:
    """One in-flight sampling client: its own prefix cache namespace over weights that change.

    A running sample computes each token with ``target``'s current weights. A client's cache survives weight changes and is
    not shared with other clients. Compared by identity.
    """

    target: InflightTarget


State = Mapping[str, NDArray[Any]]
"""Named arrays, stored as one safetensors file."""


class Backend(Protocol):
    @property
    def model_name(self) -> str:
        """The name clients pass as ``base_model``."""
        ...

    @property
    def tokenizer_path(self) -> str:
        """A local folder or hub name for ``AutoTokenizer.from_pretrained``."""
        ...

    @property
    def max_context_length(self) -> int: ...

    def create_adapter(self, lora: LoraConfig) -> Future[Adapter]: ...

    def snapshot(self, adapter: Adapter) -> Future[Snapshot]:
        """The adapter's weights after all earlier calls."""
        ...

    def sample(self, weights: Snapshot | InflightClient | None, request: SampleRequest) -> Future[SampleResult]:
        """None samples the base model. Cancelling the future removes the request from the running batch.

        The prefix cache is keyed by ``weights``; snapshots and in-flight clients share nothing.
        """
        ...

    def forward_backward(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_fn: str,
        loss_config: Mapping[str, float],
        forward_only: bool,
    ) -> Future[ForwardBackwardResult]: ...

    def optim_step(self, adapter: Adapter, params: AdamParams) -> Future[Mapping[str, float]]:
        """One Adam step on the accumulated gradients, which are then cleared. Metric names have no reduction suffix."""
        ...

    def export_adapter(self, adapter: Adapter, optimizer: bool) -> Future[State]:
        """A copy of the weights (and Adam's moments) for a checkpoint."""
        ...

    def import_adapter(self, lora: LoraConfig, state: State, optimizer: bool) -> Future[Adapter]:
        """An adapter from :meth:`export_adapter`'s state; with ``optimizer=False`` the moments start at zero."""
        ...

    def import_snapshot(self, lora: LoraConfig, state: State) -> Future[Snapshot]: ...

    def close(self) -> None:
        """Ends the thread; open futures fail."""
        ...
