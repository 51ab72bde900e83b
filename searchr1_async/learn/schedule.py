"""Learning rate schedule."""

from __future__ import annotations

import math

from searchr1_async.config import LearningSettings


def learning_rate_at(settings: LearningSettings, step: int, total: int) -> float:
    """Learning rate of batch ``step`` (from 1) of ``total``.

    Linear warm-up over ``schedule_warmup`` batches, the last at the peak rate; then constant, or linear or cosine decay that
    would reach 0 one batch after the last. Batches after ``total`` keep the last rate.

    Raises:
        ValueError: ``step`` or ``total`` is below 1.
    """
    if step < 1 or total < 1:
        raise ValueError(f"learning rate of step {step} of {total}: both count from 1")
    peak, warmup = settings.learning_rate, settings.schedule_warmup
    if step < warmup:
        return peak * step / warmup
    highest = max(1, warmup)
    done = (min(step, max(total, highest)) - highest) / (max(total, highest) - highest + 1)
    if settings.schedule == "linear":
        return peak * (1.0 - done)
    if settings.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak
