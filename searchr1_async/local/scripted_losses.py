"""Tinker's losses in numpy, for the scripted model: value, and slope by each token's log-probability.

The formulas are those of :mod:`searchr1_async.local.losses`, whose torch ones the tests compare these with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.local.loss_inputs import RATIO_MASK, Thresholds

Float64Array = NDArray[np.float64]


def loss_and_slope(
    name: str, logprobs_T: Float64Array, inputs: Mapping[str, NDArray[Any]], config: Thresholds
) -> tuple[float, Float64Array]:
    """The loss of one datum, summed over its tokens, and its derivative by each log-probability [T]."""
    if name == "cross_entropy":
        weights_T = inputs["weights"].astype(np.float64)
        return float(-(weights_T * logprobs_T).sum()), -weights_T
    advantages_T = inputs["advantages"].astype(np.float64)
    difference_T = logprobs_T - inputs["logprobs"]
    if name == "dro":
        beta = config["beta"]
        value = float((0.5 * beta * np.square(difference_T) - advantages_T * logprobs_T).sum())
        return value, beta * difference_T - advantages_T
    if name == "gspo":
        difference_T = np.full_like(logprobs_T, difference_T[inputs[RATIO_MASK] != 0].mean())
    ratio_T = np.exp(difference_T)
    if name == "importance_sampling":
        return float(-(ratio_T * advantages_T).sum()), -ratio_T * advantages_T
    clipped_T = ratio_T.clip(config["clip_low_threshold"], config["clip_high_threshold"])
    if name == "cispo":
        return float(-(clipped_T * advantages_T * logprobs_T).sum()), -clipped_T * advantages_T
    free_T, held_T = ratio_T * advantages_T, clipped_T * advantages_T
    return float(-np.minimum(free_T, held_T).sum()), -np.where(free_T <= held_T, free_T, 0.0)
