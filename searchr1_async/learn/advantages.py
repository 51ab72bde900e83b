"""Advantages within a group, and their weight per token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from searchr1_async.config import AdvantageName, NormalizationName

_SMALLEST_DEVIATION = 1e-6
"""Added to a group's standard deviation, so that constant rewards give advantages of 0."""
NOMINAL_TOKENS = 256
"""Sampled tokens at which both normalizations weigh an episode the same."""


def advantages(rewards: Sequence[float], kind: AdvantageName = "centred") -> list[float]:
    """One advantage per member, in order; they sum to 0. A single member gets 0.

    - ``centred``: ``reward - mean``, as in the recipe. Dividing by the standard deviation would weight questions by how
      nearly constant their rewards are (Liu et al., 2025, "Understanding R1-Zero-Like Training", question-level difficulty
      bias).
    - ``scaled``: ``(reward - mean) / (deviation + 1e-6)`` (Shao et al., 2024, "DeepSeekMath", GRPO), with Bessel's correction
      (n - 1) as in common GRPO implementations.
    - ``leave_one_out``: the reward minus the mean of the *other* members (Ahmadian et al., 2024, "Back to Basics", RLOO): the
      centred advantage times ``n / (n - 1)``, which only matters if group sizes differ.
    """
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(rewards) / count
    centred = [reward - mean for reward in rewards]
    if kind == "scaled":
        deviation = math.sqrt(math.fsum(value * value for value in centred) / (count - 1))
        return [value / (deviation + _SMALLEST_DEVIATION) for value in centred]
    if kind == "leave_one_out":
        return [value * count / (count - 1) for value in centred]
    return centred


def token_weight(sampled_tokens: int, normalization: NormalizationName) -> float:
    """Factor of an episode's advantage at each sampled token.

    Tinker's losses are sums over tokens. ``token``: 1, so an episode weighs as much as it has tokens. ``sequence``:
    ``256 / sampled_tokens``, GRPO's ``1 / |o|`` times a constant, so that episodes weigh the same. The constant keeps the gradient
    at the scale of ``token``, for which ``gradient_clip``, Adam's epsilon and the ``dro`` penalty are set. It is fixed rather than
    a batch mean, so that minibatches can be sent before the batch is complete.
    """
    return 1.0 if normalization == "token" else NOMINAL_TOKENS / max(1, sampled_tokens)
