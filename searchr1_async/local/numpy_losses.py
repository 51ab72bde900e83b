"""Tinker's losses in numpy, for the scripted backend, and the ratio metrics of both backends.

Formulas as in :mod:`searchr1_async.local.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.local.backend import Datum, Float32Array
from searchr1_async.local.loss_inputs import RATIO_MASK, STABLE_REINFORCE, Thresholds

Float64Array = NDArray[np.float64]
_CLIPPING = ("ppo", "cispo", "gspo", STABLE_REINFORCE)
_LARGEST_LOG_RATIO = 700.0
"""Keeps the exponential finite in double precision."""


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
