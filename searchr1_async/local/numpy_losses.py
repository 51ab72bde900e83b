"""Tinker's losses in numpy: what the scripted model computes, and what both models report of the ratios in their data.

The formulas are those of :mod:`searchr1_async.local.losses`, whose torch ones the tests compare these with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.local.backend import Datum, Float32Array
from searchr1_async.local.loss_inputs import RATIO_MASK, STABLE_REINFORCE, Thresholds

Float64Array = NDArray[np.float64]
_CLIPPING = ("ppo", "cispo", "gspo", STABLE_REINFORCE)
_LARGEST_LOG_RATIO = 700.0
"""Its exponential is still finite in double precision."""


def loss_and_slope(
    name: str, logprobs_T: Float64Array, inputs: Mapping[str, NDArray[Any]], config: Thresholds
) -> tuple[float, Float64Array]:
    """The loss of one datum, summed over its tokens, and its derivative by each log-probability [T]."""
    if name == "cross_entropy":
        weights_T = inputs["weights"].astype(np.float64)
        return float(-(weights_T * logprobs_T).sum()), -weights_T
    advantages_T = inputs["advantages"].astype(np.float64)
    if name == "dro":
        beta, difference_T = config["beta"], logprobs_T - inputs["logprobs"]
        value = float((0.5 * beta * np.square(difference_T) - advantages_T * logprobs_T).sum())
        return value, beta * difference_T - advantages_T
    ratio_T = _ratios(name, logprobs_T, inputs)
    if name == "importance_sampling":
        return float(-(ratio_T * advantages_T).sum()), -ratio_T * advantages_T
    if name == STABLE_REINFORCE:
        weight_T = np.where(advantages_T > 0, ratio_T.clip(config["alpha"], 1.0), ratio_T.clip(0.0, 1.0))
        return float(-(weight_T * advantages_T * logprobs_T).sum()), -weight_T * advantages_T
    clipped_T = ratio_T.clip(config["clip_low_threshold"], config["clip_high_threshold"])
    if name == "cispo":
        return float(-(clipped_T * advantages_T * logprobs_T).sum()), -clipped_T * advantages_T
    free_T, held_T = ratio_T * advantages_T, clipped_T * advantages_T
    return float(-np.minimum(free_T, held_T).sum()), -np.where(free_T <= held_T, free_T, 0.0)


def _ratios(name: str, logprobs_T: Float64Array, inputs: Mapping[str, NDArray[Any]]) -> Float64Array:
    """How much likelier the tokens have become since they were sampled [T]; gspo's is one for its whole sequence."""
    difference_T = logprobs_T - inputs["logprobs"]
    if name == "gspo":
        difference_T = np.full_like(difference_T, difference_T[inputs[RATIO_MASK] != 0].mean())
    return np.exp(difference_T.clip(max=_LARGEST_LOG_RATIO))


def ratio_metrics(
    name: str, config: Thresholds, data: Sequence[Datum], logprobs: Sequence[Float32Array]
) -> dict[str, float]:
    """How far off-policy a request was, over the tokens whose advantage is not 0; nothing for a loss without ratios.

    Args:
        name: the loss.
        config: its whole configuration.
        data: what was trained on.
        logprobs: of the targets under the weights that are trained, [T] for each datum.

    Returns:
        ``ratio_min:min`` and ``ratio_max:max`` (gspo: of the sequences' ratios) and, for a loss that bounds them,
        ``clipped_fraction:mean``: the share of tokens whose gradient is not that of the plain ratio.
    """
    if not data or "advantages" not in data[0].loss_inputs:
        return {}
    low, high, clipped, tokens = math.inf, -math.inf, 0, 0
    for datum, logprobs_T in zip(data, logprobs, strict=True):
        has_signal_T = datum.loss_inputs["advantages"] != 0
        if not has_signal_T.any():
            continue
        exact_T = logprobs_T.astype(np.float64)
        ratio_T = _ratios(name, exact_T, datum.loss_inputs)
        low, high = min(low, float(ratio_T[has_signal_T].min())), max(high, float(ratio_T[has_signal_T].max()))
        tokens += int(has_signal_T.sum())
        if name in _CLIPPING:
            _, slope_T = loss_and_slope(name, exact_T, datum.loss_inputs, config)
            plain_T = -ratio_T * datum.loss_inputs["advantages"]
            clipped += int((~np.isclose(slope_T, plain_T, atol=0.0))[has_signal_T].sum())
    if not tokens:
        return {}
    metrics = {"ratio_min:min": low, "ratio_max:max": high}
    return {**metrics, "clipped_fraction:mean": clipped / tokens} if name in _CLIPPING else metrics
