"""The scripted backend's model, with one parameter, and its simulated prefix cache.

Token ``t`` has log-probability ``scale_free(t) * exp(-bias)``, and Tinker's losses and Adam update ``bias``. So the sampler and
the trainer agree at the same version, versions differ, and checkpoint round-trips can be tested.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.local.backend import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackwardResult,
    Int32Array,
    LoraConfig,
    State,
    check_data,
    common_prefix_length,
    find_inputs,
    loss_and_slope,
)

Array = NDArray[Any]
MOST_TOKENS = 2_000_000
"""Maximum tokens cached per sampler; beyond it the cache is cleared."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Weights:
    """A snapshot: an immutable version. Compared by identity, since each snapshot has its own prefix cache."""

    bias: float = 0.0
    version: int = 0
    """Optimizer steps."""


@dataclass(slots=True, eq=False)
class ScriptedAdapter:
    """A trainable version: one parameter with its gradient and Adam moments."""

    lora: LoraConfig
    weights: Weights = field(default_factory=Weights)
    gradient: float = 0.0
    moments: tuple[float, float] = (0.0, 0.0)
    steps_submitted: int = 0
    """Optimizer steps submitted, including those still queued."""


def scale_free(tokens: Array) -> Array:
    """A fixed log-probability per token id in [-2.1, -0.1]; same shape, float64."""
    return -0.1 - 2.0 * ((tokens.astype(np.uint64) * np.uint64(2654435761)) % np.uint64(1 << 32)) / 2.0**32


def logprobs_of(tokens: Array, weights: Weights) -> Float32Array:
    """Log-probabilities of tokens at a version, for both sampler and trainer; same shape."""
    return (scale_free(tokens) * math.exp(-weights.bias)).astype(np.float32)


def topk(tokens: Array, weights: Weights, k: int) -> tuple[Array, Array]:
    """Each token and the k - 1 following ids, most likely first: ids and log-probabilities, each [N, k]."""
    ids = np.asarray(tokens, np.int32)[:, None] + np.arange(k, dtype=np.int32)
    logprobs = logprobs_of(ids, weights)
    order = np.argsort(-logprobs, axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)


def weights_in(state: State) -> Weights:
    return Weights(float(state["bias"][0]), int(state["version"][0]))


def forward_backward(
    adapter: ScriptedAdapter,
    data: Sequence[Datum],
    loss_fn: str,
    loss_config: Mapping[str, float],
    forward_only: bool,
) -> ForwardBackwardResult:
    """Tinker's losses and their gradient: d logprob / d bias = -logprob."""
    inputs, config = find_inputs(loss_fn, loss_config)
    check_data(data, loss_fn, inputs)
    loss, gradient, rows = 0.0, 0.0, []
    for datum in data:
        logprobs = logprobs_of(datum.loss_inputs["target_tokens"], adapter.weights)
        rows.append(logprobs)
        lp = logprobs.astype(np.float64)
        value, slope = loss_and_slope(loss_fn, lp, datum.loss_inputs, config)
        loss += value
        gradient += float(np.sum(slope * -lp))
    if not forward_only:
        adapter.gradient += gradient
    return ForwardBackwardResult(tuple(rows), {"loss:sum": loss})


def optim_step(adapter: ScriptedAdapter, params: AdamParams) -> dict[str, float]:
    gradient = adapter.gradient
    norm = abs(gradient)
    if params.grad_clip_norm and norm > params.grad_clip_norm:
        gradient *= params.grad_clip_norm / norm
    step = adapter.weights.version + 1
    first = params.beta1 * adapter.moments[0] + (1 - params.beta1) * gradient
    second = params.beta2 * adapter.moments[1] + (1 - params.beta2) * gradient**2
    direction = first / (1 - params.beta1**step) / (math.sqrt(second / (1 - params.beta2**step)) + params.eps)
    bias = adapter.weights.bias * (1 - params.learning_rate * params.weight_decay) - params.learning_rate * direction
    adapter.weights = replace(adapter.weights, bias=bias, version=step)
    adapter.moments, adapter.gradient = (first, second), 0.0
    return {"unclipped_grad_l2": norm}


class PrefixCache:
    """The token sequences that one sampler has run; a sequence replaces its own prefixes."""

    def __init__(self) -> None:
        # Sorted. Big-endian bytes sort like the integers, so sequences with the longest common prefix are neighbours.
        self._texts: list[bytes] = []
        self._tokens = 0

    def hits(self, prompt: Int32Array) -> int:
        """Number of cached tokens of ``prompt``, excluding the last one, whose logits are always needed."""
        key = _key(prompt)
        place = bisect.bisect(self._texts, key)
        near = self._texts[max(0, place - 1) : place + 1]
        known = (common_prefix_length(np.frombuffer(text, ">i4"), prompt) for text in near)
        return min(max(known, default=0), len(prompt) - 1)

    def add(self, prompt: Int32Array, continuations: Sequence[Int32Array]) -> None:
        """Cache a prompt with each continuation, without the last token, which was never run."""
        if self._tokens > MOST_TOKENS:
            self._texts.clear()
            self._tokens = 0
        for tokens in continuations:
            key = _key(np.concatenate([prompt, tokens[:-1]]))
            place = bisect.bisect_left(self._texts, key)
            if place < len(self._texts) and self._texts[place].startswith(key):
                continue
            while place and key.startswith(self._texts[place - 1]):
                place -= 1
                self._tokens -= len(self._texts.pop(place)) // 4
            self._texts.insert(place, key)
            self._tokens += len(key) // 4


def _key(tokens: Int32Array) -> bytes:
    return np.ascontiguousarray(tokens, dtype=">i4").tobytes()
