"""The learning rate of each optimiser step."""

from __future__ import annotations

import math

from searchr1_async.config import LearningSettings


def learning_rate_at(settings: LearningSettings, step: int, total: int) -> float:
    """The learning rate of batch ``step``, counted from 1, of ``total``.

    It rises in a line over the first ``schedule_warmup`` batches, the last of which has the peak, then stays there or
    falls, in a line or half a cosine, so that it would reach 0 in the batch after the last: no batch is wasted on a rate
    of 0. Without a warm-up the first batch has the peak. A batch after ``total`` has the rate of the last.

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
