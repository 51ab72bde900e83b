"""How much better a member did than its group."""

from __future__ import annotations

from collections.abc import Sequence


def centred_advantages(rewards: Sequence[float]) -> list[float]:
    """``reward - mean(rewards)``, not divided by the standard deviation.

    Dividing by the deviation weights questions by how nearly constant their rewards are (Liu et al., 2025, "Understanding
    R1-Zero-Like Training", the question-level difficulty bias); the recipe does not, and neither do we.
    """
    mean = sum(rewards) / len(rewards) if rewards else 0.0
    return [reward - mean for reward in rewards]
