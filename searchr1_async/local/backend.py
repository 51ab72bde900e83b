"""What a model must offer to stand behind the embedded Tinker service.

The server (:mod:`searchr1_async.local.server`) speaks the wire protocol and keeps order, idempotency and checkpoints; a
:class:`Backend` computes. Two exist: :class:`~searchr1_async.local.torch_backend.TorchBackend`, a real language model, and
:class:`~searchr1_async.local.scripted.ScriptedBackend`, a function of the prompt with modelled latency.

Every method returns at once; work is done on the backend's own thread and answered through a
:class:`concurrent.futures.Future`, so the server's event loop stays free. Calls on one :class:`Adapter` are carried out in
the order in which they were made. A bad request fails its future with :class:`UserFault` (the client's mistake, told
to it in words); anything else that escapes is the server's fault.
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
    """The request cannot be carried out as asked; the message goes to the client (category ``user``)."""


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
    """Tinker's ``adam_params``; gradient clipping is by global norm, 0 is none."""

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
    """New tokens at most; None: up to the model's context length."""
    temperature: float = 1.0
    """0 is greedy. Log-probabilities returned are those of the untempered distribution's softmax at this temperature 1, as Tinker's are."""
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop_tokens: tuple[int, ...] | None = None
    """None: the model's own end-of-text tokens. Empty: never stop early."""
    stop_strings: tuple[str, ...] = ()
    """Generation ends after the first token whose decoded text completes one of these; the token is kept."""
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class SampledSequence:
    tokens: Int32Array
    """Shape [N], the stop token included."""
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
    """Tokens of the prompt that were in the prefix cache; counted once, whatever ``num_samples`` is."""


@dataclass(frozen=True, slots=True)
class Datum:
    """One training example: inputs of length T and per-token loss inputs of the same length."""

    tokens: Int32Array
    """Model input, shape [T]."""
    loss_inputs: Mapping[str, NDArray[Any]]
    """``target_tokens`` int64 [T]; ``weights`` f32 [T] for cross_entropy; ``logprobs`` and ``advantages`` f32 [T] for the RL losses."""


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    logprobs: tuple[Float32Array, ...]
    """For each datum the log-probability of each target token, [T]."""
    metrics: Mapping[str, float]
    """Names carry Tinker's reduction: ``loss:sum``, …"""


class Adapter(Protocol):
    """A trainable LoRA adapter with its optimiser state and gradients; opaque to the server."""

    @property
    def lora(self) -> LoraConfig: ...


class Snapshot(Protocol):
    """Immutable sampler weights; opaque to the server. Freed when nothing refers to it."""


class InflightTarget(Protocol):
    """The weights that all in-flight sampling clients of one model share; each save replaces them."""

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest weights; never None while a sample runs."""
        ...


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class InflightClient:
    """One in-flight sampling client: a cache namespace of its own over weights that move on.

    A running sample computes each token with the weights that ``target`` has at that moment. What is cached under a client
    stays when the weights are replaced, and is shared with no other client. Compared by identity.
    """

    target: InflightTarget


State = Mapping[str, NDArray[Any]]
"""Named arrays, as they go into one safetensors file."""


class Backend(Protocol):
    """A model behind the service."""

    @property
    def model_name(self) -> str:
        """The name that clients use as ``base_model``."""
        ...

    @property
    def tokenizer_path(self) -> str:
        """A local folder that ``AutoTokenizer.from_pretrained`` can load, or a hub name."""
        ...

    @property
    def max_context_length(self) -> int: ...

    def create_adapter(self, lora: LoraConfig) -> Future[Adapter]: ...

    def snapshot(self, adapter: Adapter) -> Future[Snapshot]:
        """The adapter's weights as they are after all calls made before this one."""
        ...

    def sample(self, weights: Snapshot | InflightClient | None, request: SampleRequest) -> Future[SampleResult]:
        """None samples the base model. Cancelling the future takes the request out of the running batch.

        Prefixes are cached by ``weights``: nothing is shared between two snapshots or two in-flight clients.
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
        """One Adam step on the accumulated gradients, which are cleared. Metric names carry no reduction."""
        ...

    def export_adapter(self, adapter: Adapter, optimizer: bool) -> Future[State]:
        """A copy of the weights (and of the optimiser's moments) for a checkpoint."""
        ...

    def import_adapter(self, lora: LoraConfig, state: State, optimizer: bool) -> Future[Adapter]:
        """An adapter from :meth:`export_adapter`; with ``optimizer=False`` the moments start at zero."""
        ...

    def import_snapshot(self, lora: LoraConfig, state: State) -> Future[Snapshot]: ...

    def close(self) -> None:
        """Ends the thread; futures still open fail."""
        ...
