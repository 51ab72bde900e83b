"""How much better a member did than its group, and how much each of its tokens counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from searchr1_async.config import AdvantageName, NormalizationName

_SMALLEST_DEVIATION = 1e-6
"""Added to a group's standard deviation, so that a group of constant reward has advantages of 0 and not of 0/0."""
NOMINAL_TOKENS = 256
"""Sampled tokens of an episode that weighs the same under both normalisations."""


def advantages(rewards: Sequence[float], kind: AdvantageName = "centred") -> list[float]:
    """One advantage a member, in order; they sum to 0. A group of one has nothing to be compared with: 0.

    - ``centred``: ``reward - mean``. Not divided by the standard deviation, which would weight questions by how nearly
      constant their rewards are (Liu et al., 2025, "Understanding R1-Zero-Like Training", the question-level difficulty
      bias). The recipe's choice.
    - ``scaled``: ``(reward - mean) / (deviation + 1e-6)`` (Shao et al., 2024, "DeepSeekMath", GRPO), the deviation with
      Bessel's correction (n - 1), as GRPO's usual implementations have it.
    - ``leave_one_out``: the reward less the mean of the *other* members' (Ahmadian et al., 2024, "Back to Basics", RLOO),
      which is ``n / (n - 1)`` times the centred one: it only matters where groups differ in size.
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
    """What an episode's advantage is multiplied by at each of its sampled tokens.

    Tinker's losses are sums over tokens. ``token``: 1, so an episode weighs as much as it has tokens. ``sequence``:
    ``256 / sampled_tokens``, GRPO's ``1 / |o|`` times a constant, so every episode weighs the same. The constant keeps the
    gradient's size about what it is under ``token``: without it the gradient would shrink by the length of an episode, some
    hundred times, and ``gradient_clip``, Adam's epsilon and the penalty of ``dro`` would mean something else. It is fixed,
    and no mean of the batch, so that a minibatch can go out before the others are known.
    """
    return 1.0 if normalization == "token" else NOMINAL_TOKENS / max(1, sampled_tokens)
