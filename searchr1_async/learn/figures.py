"""Training metrics of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tinker import types as tinker_types

from searchr1_async.episodes.types import Episode
from searchr1_async.learn.examples import at_sampled, sampled_logprobs


@dataclass(frozen=True, slots=True)
class LearnedMinibatch:
    """A minibatch with the service's answer."""

    output: tinker_types.ForwardBackwardOutput
    episodes: Sequence[Episode]
    """One per output record, in order."""
    tokens: int
    """Tokens of its examples, prompts included."""
    kl_base: float | None = None
    """Sum over sampled tokens of log p_sampled - log p_base; None without a penalty."""
    is_fallback: bool | None = None
    """Whether the fallback loss was used; None if the run's loss accepts every episode."""


def learning_metrics(minibatches: Sequence[LearnedMinibatch]) -> dict[str, float]:
    """Training metrics over all sampled tokens of a batch (not a mean of minibatch means), named as in the recipe.

    ``optim/entropy``: mean of -log p(sampled token) under the sampler. ``optim/kl_sample_train_v1``: mean of
    log p_sampler - log p_trainer; ``v2``: half the mean of its square (Schulman, 2020, "Approximating KL Divergence",
    estimators k1 and k2). Both are 0 for an exact service before the first step on new data. ``optim/kl_base``: mean of
    log p_sampler - log p_base, with a penalty only. Metrics of the service (``name:reduction``) become ``optim/name``, reduced
    as in the SDK, with means weighted by examples.

    With two losses in a batch (see :class:`~searchr1_async.learn.learner.Learner`), ``optim/loss`` is their sum and
    ``optim/fallback_datums`` counts the examples with the fallback loss.
    """
    tokens, entropy, first, second, loss = 0, 0.0, 0.0, 0.0, 0.0
    for minibatch in minibatches:
        loss += float(minibatch.output.metrics.get("loss:sum", 0.0))
        for record, episode in zip(minibatch.output.loss_fn_outputs, minibatch.episodes, strict=True):
            sampled_A = sampled_logprobs(episode)
            difference_A = sampled_A - at_sampled(episode, record["logprobs"].to_numpy())
            tokens += len(sampled_A)
            entropy -= float(sampled_A.sum())
            first += float(difference_A.sum())
            second += 0.5 * float(np.square(difference_A).sum())
    if not tokens:
        return {"optim/tokens": 0.0}
    sizes = [minibatch.tokens for minibatch in minibatches]
    metrics = _service_metrics(minibatches) | {
        "optim/loss": loss,
        "optim/tokens": float(tokens),
        "optim/datums": float(sum(len(minibatch.episodes) for minibatch in minibatches)),
        "optim/minibatches": float(len(minibatches)),
        "optim/tokens_per_minibatch_min": float(min(sizes)),
        "optim/tokens_per_minibatch_max": float(max(sizes)),
        "optim/entropy": entropy / tokens,
        "optim/kl_sample_train_v1": first / tokens,
        "optim/kl_sample_train_v2": second / tokens,
    }
    if any(minibatch.is_fallback is not None for minibatch in minibatches):
        others = sum(len(minibatch.episodes) for minibatch in minibatches if minibatch.is_fallback)
        metrics["optim/fallback_datums"] = float(others)
    sums = [minibatch.kl_base for minibatch in minibatches if minibatch.kl_base is not None]
    if len(sums) == len(minibatches):
        metrics["optim/kl_base"] = sum(sums) / tokens
    return metrics


def _service_metrics(minibatches: Sequence[LearnedMinibatch]) -> dict[str, float]:
    found: dict[str, float] = {}
    keys = dict.fromkeys(key for minibatch in minibatches for key in minibatch.output.metrics)
    for key in keys:
        name, _, reduction = key.partition(":")
        those = [minibatch for minibatch in minibatches if key in minibatch.output.metrics]
        present = [float(minibatch.output.metrics[key]) for minibatch in those]
        if key == "loss:sum":
            continue
        if reduction == "mean":
            weights = [len(minibatch.episodes) for minibatch in those]
            found[f"optim/{name}"] = float(np.average(present, weights=weights))
        elif reduction in _REDUCTIONS:
            found[f"optim/{name}"] = float(_REDUCTIONS[reduction](present))
    return found


_REDUCTIONS = {"sum": sum, "min": min, "max": max}


def optimizer_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Service metrics of a batch's optimizer steps: the mean of gradient metrics, the last value of others."""
    found: dict[str, float] = {}
    for key in steps[-1] if steps else ():
        values = [float(step[key]) for step in steps if key in step]
        found[f"optim/{key}"] = sum(values) / len(values) if "grad" in key else values[-1]
    return found
