"""What the service and its backends share: the interface of a model, and Tinker's losses in numpy. Imports no torch.

The server handles the wire protocol, ordering, idempotency and checkpoints; a :class:`Backend` computes:
:class:`~searchr1_async.local.torch_backend.TorchBackend` runs a real language model,
:class:`~searchr1_async.local.scripted_backend.ScriptedBackend` a function of the prompt with modelled latency.

A backend's methods return immediately; work runs on its own thread and resolves a :class:`concurrent.futures.Future`. Calls
on one :class:`Adapter` run in submission order. A bad request fails its future with :class:`UserFault`; any other exception
is the server's fault. Formulas of the losses: :mod:`searchr1_async.local.trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
State = Mapping[str, NDArray[Any]]
"""Named arrays, stored as one safetensors file."""
Thresholds = Mapping[str, float]

MAX_SAMPLES = 1024
"""Maximum ``num_samples`` per request."""
RATIO_MASK = "sequence_ratio_mask"
"""gspo: non-zero where a token counts in its sequence's ratio."""
STABLE_REINFORCE = "stable_reinforce"
"""Its data must have provenance; the service inserts the recorded ``logprobs``."""
_CLIPPING = ("ppo", "cispo", "gspo", STABLE_REINFORCE)
_LARGEST_LOG_RATIO = 700.0
"""Keeps the exponential finite in double precision."""


class UserFault(Exception):
    """The request is invalid; the message goes to the client (category ``user``)."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Tinker's ``lora_config``. Raises :class:`UserFault` for a rank out of range, or if it trains nothing."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise UserFault(f"lora_config.rank is {self.rank}; it must lie between 1 and 1024.")
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise UserFault("lora_config trains nothing: set train_attn, train_mlp or train_unembed.")


@dataclass(frozen=True, slots=True)
class AdamParams:
    """Tinker's ``adam_params``. ``grad_clip_norm`` is a global norm; 0 disables clipping.

    Raises :class:`UserFault` if one is out of range.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            high = 1.0 if name in ("beta1", "beta2") else math.inf
            if not 0.0 <= value < high:
                raise UserFault(f"adam_params.{name} is {value}; it must lie in [0, {high:g}).")


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One ``asample``: ``num_samples`` continuations of one prompt. Raises :class:`UserFault` if a value is out of range."""

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

    def __post_init__(self) -> None:
        if len(self.prompt) < 1:
            raise UserFault("The prompt is empty; give at least one token.")
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            raise UserFault(f"num_samples is {self.num_samples}; it must be at least 1 and at most {MAX_SAMPLES}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserFault(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if not 0.0 <= self.temperature < math.inf:
            raise UserFault(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserFault(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if self.top_k < -1:
            raise UserFault(f"top_k is {self.top_k}; it must be -1 (no limit) or a positive number.")
        if min(self.topk_prompt_logprobs, self.topk_sample_logprobs) < 0:
            raise UserFault("topk_prompt_logprobs and topk_sample_logprobs must be at least 0.")


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


@dataclass(frozen=True, slots=True)
class LossInputs:
    """A loss's inputs besides the tokens."""

    fields: tuple[str, ...]
    """Per-token fields besides ``target_tokens``."""
    config: Thresholds
    """Allowed ``loss_fn_config`` names with their defaults."""
    weight: str | None
    """The field whose zeros mark tokens without gradient; None: every token may have one."""
    is_sequential: bool = False
    """Terms depend on the sequence's log-probabilities, through a ratio without gradient."""


_RL = ("logprobs", "advantages")
LOSS_INPUTS: Mapping[str, LossInputs] = {
    "cross_entropy": LossInputs(("weights",), {}, "weights"),
    "importance_sampling": LossInputs(_RL, {}, "advantages"),
    "ppo": LossInputs(_RL, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, "advantages"),
    "cispo": LossInputs(_RL, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, "advantages"),
    "dro": LossInputs(_RL, {"beta": 0.05}, None),
    # Zheng et al., 2025, section 5.1. Much tighter than PPO's, since sequence means vary far less than tokens.
    "gspo": LossInputs(
        (*_RL, RATIO_MASK),
        {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
        "advantages",
        is_sequential=True,
    ),
    STABLE_REINFORCE: LossInputs(_RL, {"alpha": 1.0}, "advantages"),
}


def find_inputs(name: str, config: Mapping[str, float]) -> tuple[LossInputs, Thresholds]:
    """A loss's inputs, and its configuration with defaults filled in.

    Raises:
        UserFault: unknown loss, or a configuration entry that is unknown, not finite or out of range.
    """
    inputs = LOSS_INPUTS.get(name)
    if inputs is None:
        raise UserFault(f"Unknown loss_fn {name!r}; expected one of {', '.join(LOSS_INPUTS)}.")
    for key, value in config.items():
        if key not in inputs.config:
            known = ", ".join(inputs.config) or "nothing"
            raise UserFault(f"loss_fn_config of {name!r} contains {key!r}; allowed: {known}.")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserFault(f"loss_fn_config[{key!r}] is {value!r}, which is not a finite number.")
    thresholds = {**inputs.config, **config}
    if thresholds.get("clip_low_threshold", 0.0) > thresholds.get("clip_high_threshold", math.inf):
        raise UserFault(f"loss_fn_config of {name!r}: clip_low_threshold is above clip_high_threshold.")
    if not 0.0 <= thresholds.get("alpha", 0.0) <= 1.0:
        raise UserFault(f"loss_fn_config of {name!r}: alpha is {thresholds['alpha']:g}; it must lie in [0, 1].")
    return inputs, thresholds


def check_data(
    data: Sequence[Datum], name: str, inputs: LossInputs, vocabulary: int | None = None, context: int | None = None
) -> None:
    """Validate data for a loss. Raises :class:`UserFault` naming the invalid datum and field.

    ``vocabulary`` is the exclusive upper bound of token ids, ``context`` the maximum tokens per datum; None: no limit.
    """
    if not data:
        raise UserFault("forward_backward got no data.")
    most = math.inf if context is None else context
    wanted = ("target_tokens", *inputs.fields)
    for index, datum in enumerate(data):
        where = f"datum {index} of {len(data)}"
        tokens, there = datum.tokens, ", ".join(sorted(datum.loss_inputs)) or "nothing"
        if tokens.ndim != 1 or not 1 <= len(tokens) <= most:
            raise UserFault(f"{where}: model_input has shape {list(tokens.shape)}; expected 1 to {most} tokens.")
        for field in wanted:
            if field not in datum.loss_inputs:
                raise UserFault(f"{where}: loss_fn {name!r} needs loss_fn_inputs[{field!r}]; it has {there}.")
            values = np.asarray(datum.loss_inputs[field])
            if values.shape != tokens.shape:
                raise UserFault(
                    f"{where}: loss_fn_inputs[{field!r}] has shape {list(values.shape)}, but model_input has "
                    f"{len(tokens)} tokens."
                )
            if field != "target_tokens" and not np.isfinite(values).all():
                raise UserFault(f"{where}: loss_fn_inputs[{field!r}] contains values that are not finite.")
        if extra := sorted(set(datum.loss_inputs) - set(wanted)):
            raise UserFault(f"{where}: loss_fn {name!r} takes {', '.join(wanted)}, not {', '.join(extra)}.")
        if inputs.is_sequential and not np.any(datum.loss_inputs[RATIO_MASK]):
            raise UserFault(f"{where}: loss_fn_inputs[{RATIO_MASK!r}] marks no token, so its sequence has no ratio.")
        for field, ids in (("model_input", tokens), ("target_tokens", np.asarray(datum.loss_inputs["target_tokens"]))):
            if ids.min() < 0 or (vocabulary is not None and ids.max() >= vocabulary):
                last = "" if vocabulary is None else vocabulary - 1
                raise UserFault(f"{where}: {field} contains a token id outside 0 to {last}.")


def loss_and_slope(
    name: str, logprobs_T: Float64Array, inputs: Mapping[str, NDArray[Any]], config: Thresholds
) -> tuple[float, Float64Array]:
    """The summed loss of one datum and its derivative with respect to each log-probability [T]."""
    if name == "cross_entropy":
        weights_T = inputs["weights"].astype(np.float64)
        return float(-(weights_T * logprobs_T).sum()), -weights_T
    advantages_T = inputs["advantages"].astype(np.float64)
    if name == "dro":
        beta, difference_T = config["beta"], logprobs_T - inputs["logprobs"]
        value = float((0.5 * beta * np.square(difference_T) - advantages_T * logprobs_T).sum())
        return value, beta * difference_T - advantages_T
    ratio_T = _ratios(name, logprobs_T, inputs)
    factor_T = _factors(name, ratio_T, advantages_T, config)
    slope_T = -factor_T * advantages_T
    if name in ("cispo", STABLE_REINFORCE):
        return float((slope_T * logprobs_T).sum()), slope_T
    if name == "importance_sampling":
        return float(slope_T.sum()), slope_T
    clipped_T = ratio_T.clip(config["clip_low_threshold"], config["clip_high_threshold"])
    return float(-np.minimum(ratio_T * advantages_T, clipped_T * advantages_T).sum()), slope_T


def _factors(name: str, ratio_T: Float64Array, advantages_T: Float64Array, config: Thresholds) -> Float64Array:
    """The factor in the gradient -factor · advantage [T]: the ratio, unless clipped."""
    if name == STABLE_REINFORCE:
        return np.where(advantages_T > 0, ratio_T.clip(config["alpha"], 1.0), ratio_T.clip(0.0, 1.0))
    if name not in _CLIPPING:
        return ratio_T
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    if name == "cispo":
        return ratio_T.clip(low, high)
    return np.where(np.where(advantages_T > 0, ratio_T <= high, ratio_T >= low), ratio_T, 0.0)


def _ratios(name: str, logprobs_T: Float64Array, inputs: Mapping[str, NDArray[Any]]) -> Float64Array:
    """Probability ratios relative to sampling [T]; gspo's is the same for the whole sequence."""
    difference_T = logprobs_T - inputs["logprobs"]
    if name == "gspo":
        difference_T = np.full_like(difference_T, difference_T[inputs[RATIO_MASK] != 0].mean())
    return np.exp(difference_T.clip(max=_LARGEST_LOG_RATIO))


def ratio_metrics(
    name: str, config: Thresholds, data: Sequence[Datum], logprobs: Sequence[Float32Array]
) -> dict[str, float]:
    """Off-policy metrics over tokens with non-zero advantage; empty for a loss without ratios.

    ``logprobs`` [T] per datum are under the trained weights. Returns ``ratio_min:min``, ``ratio_max:max`` (gspo: sequence
    ratios) and, for a clipping loss, ``clipped_fraction:mean``, the fraction of tokens with a clipped gradient.
    """
    if not data or "advantages" not in data[0].loss_inputs:
        return {}
    pairs = list(zip(data, logprobs, strict=True))
    ratio_T = np.concatenate([_ratios(name, rows_T.astype(np.float64), datum.loss_inputs) for datum, rows_T in pairs])
    advantages_T = np.concatenate([datum.loss_inputs["advantages"] for datum in data]).astype(np.float64)
    has_signal_T = advantages_T != 0
    if not has_signal_T.any():
        return {}
    ratio_T, advantages_T = ratio_T[has_signal_T], advantages_T[has_signal_T]
    metrics = {"ratio_min:min": float(ratio_T.min()), "ratio_max:max": float(ratio_T.max())}
    if name in _CLIPPING:
        metrics["clipped_fraction:mean"] = float((_factors(name, ratio_T, advantages_T, config) != ratio_T).mean())
    return metrics


def common_prefix_length(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    """Number of equal tokens at the start of two sequences."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
