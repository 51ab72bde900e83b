"""Training examples: one ``tinker.Datum`` per episode, the KL penalty of its tokens, and metrics of what was learned from them.

Shapes: T targets (all tokens but the first), A sampled tokens of an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import anyio
import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.network import SDK_FAULTS, fault_text
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.errors import ServiceError
from searchr1_async.service.connection import TrainingCalls

Span = tinker_types.PromptProvenanceSpan | tinker_types.SampledProvenanceSpan


def sampled_places(episode: Episode) -> Iterator[slice]:
    """Positions of each turn's sampled tokens among the targets, which are shifted by one."""
    position = len(episode.prompt_tokens) - 1
    for turn in episode.turns:
        yield slice(position, position + len(turn.sampled_tokens))
        position += len(turn.sampled_tokens) + len(turn.appended_tokens)


def sampled_logprobs(episode: Episode) -> NDArray[np.float64]:
    """Log-probabilities reported by the sampler for all sampled tokens, in order; shape [A]."""
    return np.concatenate([np.empty(0), *(np.asarray(turn.logprobs, dtype=np.float64) for turn in episode.turns)])


def at_sampled(episode: Episode, values_T: NDArray[np.floating]) -> NDArray[np.float64]:
    """Selects the sampled tokens' values, in order; shape [A]."""
    wide_T = values_T.astype(np.float64)
    return np.concatenate([np.empty(0), *(wide_T[place] for place in sampled_places(episode))])


def _shifted(episode: Episode) -> tuple[tinker_types.ModelInput, NDArray[np.int64]]:
    """Inputs (all tokens but the last) and targets (all but the first)."""
    pieces = [episode.prompt_tokens]
    for turn in episode.turns[:-1]:
        pieces += [turn.sampled_tokens, turn.appended_tokens]
    pieces.append(episode.turns[-1].sampled_tokens)
    # Not Episode.tokens, which would be cached for the episode's lifetime.
    tokens = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])
    # An array skips the validation of each token, and the SDK converts to one anyway, on the thread of all requests.
    chunk = tinker_types.EncodedTextChunk.model_construct(tokens=tokens[:-1])
    return tinker_types.ModelInput(chunks=[chunk]), tokens[1:].astype(np.int64)


def provenance(episode: Episode) -> tuple[list[Span], list[Span]] | None:
    """Source of each input and target token of an episode, as runs in token order.

    The prompt of turn n is everything before its sampled tokens. So tokens appended before turn n are part of turn n's request
    prompt and carry its sequence id: the episode's prompt that of the first turn, a tool result that of the turn after it.
    Inputs are all tokens but the last, targets all but the first. Empty runs are left out.

    Returns:
        The runs of the inputs and of the targets, each covering T positions; None if a turn has no sequence id or nothing was
        sampled.
    """
    spans: list[Span] = []
    position, new_tokens = 0, len(episode.prompt_tokens)
    for turn in episode.turns:
        if turn.sequence_id is None:
            return None
        if new_tokens:
            spans.append(
                tinker_types.PromptProvenanceSpan(sequence_id=turn.sequence_id, offset=position, length=new_tokens)
            )
        if turn.sampled_tokens:
            spans.append(
                tinker_types.SampledProvenanceSpan(sequence_id=turn.sequence_id, length=len(turn.sampled_tokens))
            )
        position += new_tokens + len(turn.sampled_tokens)
        new_tokens = len(turn.appended_tokens)
    if not episode.action_token_count:
        return None
    first, last = spans[0], spans[-1]
    inputs = [*spans[:-1], replace(last, length=last.length - 1)]
    targets = [replace(first, offset=first.offset + 1, length=first.length - 1), *spans[1:]]
    return [span for span in inputs if span.length], [span for span in targets if span.length]


def without_sequence_ids(group: Group) -> Group:
    """Drops all sequence ids, so that the group's examples have no provenance."""

    def unnamed(episode: Episode) -> Episode:
        return replace(episode, turns=tuple(replace(turn, sequence_id=None) for turn in episode.turns))

    return Group(group.question, tuple(map(unnamed, group.episodes)), tuple(map(unnamed, group.failed)))


def to_datum(
    episode: Episode,
    advantage: float | NDArray[np.floating],
    *,
    with_ratio_mask: bool = False,
    with_provenance: bool = False,
) -> tinker_types.Datum:
    """Example for the policy-gradient losses; the episode must have a turn.

    Inputs are all tokens but the last, targets all but the first, shape [T]. ``logprobs`` (from the sampler) and ``advantages``
    are 0 except at sampled tokens, so only those are trained on.

    Args:
        advantage: of the episode, or per sampled token [A].
        with_ratio_mask: add ``sequence_ratio_mask``, 1 at sampled tokens, required by the loss ``gspo``.
        with_provenance: add each token's source, required by the loss ``stable_reinforce``, if :func:`provenance` has it.
    """
    inputs, targets_T = _shifted(episode)
    mask_T = np.zeros(len(targets_T), dtype=np.float32)
    for place in sampled_places(episode):
        mask_T[place] = 1.0
    sampled_T = mask_T > 0
    logprobs_T, advantages_T = np.zeros_like(mask_T), np.zeros_like(mask_T)
    logprobs_T[sampled_T] = sampled_logprobs(episode)
    advantages_T[sampled_T] = advantage
    tensors = {"target_tokens": targets_T, "logprobs": logprobs_T, "advantages": advantages_T}
    if with_ratio_mask:
        tensors["sequence_ratio_mask"] = mask_T
    datum = _datum(inputs, tensors)
    spans = provenance(episode) if with_provenance else None
    return datum if spans is None else datum.with_provenance(model_input=spans[0], loss_fn_inputs=spans[1])


def to_supervised_datum(episode: Episode) -> tinker_types.Datum:
    """Example for cross_entropy: weight 1 at tokens that the model should write, 0 elsewhere."""
    inputs, targets_T = _shifted(episode)
    weights_T = np.zeros(len(targets_T), dtype=np.float32)
    for place in sampled_places(episode):
        weights_T[place] = 1.0
    return _datum(inputs, {"target_tokens": targets_T, "weights": weights_T})


def _datum(inputs: tinker_types.ModelInput, tensors: dict[str, NDArray[np.generic]]) -> tinker_types.Datum:
    return tinker_types.Datum(
        model_input=inputs,
        loss_fn_inputs={name: tinker_types.TensorData.from_numpy(values) for name, values in tensors.items()},
    )


_AT_ONCE = 64
"""Concurrent requests to the base model: enough to keep it busy without delaying samples."""


def kl_penalties(differences: Sequence[NDArray[np.float64]], coefficient: float) -> list[NDArray[np.float64]]:
    """Values to add to the advantages of a group's sampled tokens.

    ``coefficient * (mean - (log p_sampled - log p_base))``: negative where the policy makes a token likelier than the base model.
    The mean is over the group's sampled tokens, so a group's penalties sum to 0 and do not depend on its minibatch. The same term
    as tinker-cookbook's ``incorporate_kl_penalty``, which centres over the whole batch; streamed minibatches are sent before that
    mean is known.

    Args:
        differences: ``log p_sampled - log p_base`` of each member's sampled tokens [A].
    """
    tokens = sum(len(values_A) for values_A in differences)
    mean = sum(float(values_A.sum()) for values_A in differences) / max(1, tokens)
    return [coefficient * (mean - values_A) for values_A in differences]


async def base_logprobs(
    client: tinker.SamplingClient,
    episodes: Sequence[Episode],
    calls: TrainingCalls,
    *,
    count: Callable[[TokenUsage], None] = lambda usage: None,
) -> list[NDArray[np.float64]]:
    """Log-probabilities of each episode's sampled tokens [A] under the model of ``client``, one request per episode.

    Args:
        calls: provides the deadline for all requests together.
        count: receives token usage: the prompt when a request is sent, cached and sampled tokens when it is answered.

    Raises:
        ServiceError: the service failed or did not answer before the deadline.
    """
    found: list[NDArray[np.float64]] = [np.empty(0) for _ in episodes]
    slots = anyio.Semaphore(_AT_ONCE)
    failures: list[Exception] = []

    async def one(place: int, stop: anyio.CancelScope) -> None:
        async with slots:
            try:
                found[place] = await _sampled_base_logprobs(client, episodes[place], count)
            except SDK_FAULTS as error:
                failures.append(error)
                stop.cancel()

    with calls.waiting("computing the base model's log-probabilities"):
        async with anyio.create_task_group() as tasks:
            for place, episode in enumerate(episodes):
                if episode.turns:
                    tasks.start_soon(one, place, tasks.cancel_scope)
    if failures:
        error = failures[0]
        raise ServiceError(
            f"the Tinker service returned no log-probabilities of the base model: {fault_text(error)}"
        ) from error
    return found


def _scored_tokens(episode: Episode) -> list[int]:
    """The episode up to its last sampled token."""
    tokens = list(episode.prompt_tokens)
    for turn in episode.turns[:-1]:
        tokens += turn.sampled_tokens + turn.appended_tokens
    tokens += episode.turns[-1].sampled_tokens
    return tokens


async def _sampled_base_logprobs(
    client: tinker.SamplingClient, episode: Episode, count: Callable[[TokenUsage], None]
) -> NDArray[np.float64]:
    tokens = _scored_tokens(episode)
    count(TokenUsage(prompt=len(tokens)))
    # Like the SDK's compute_logprobs, which does not report cache hits. The prompt's own log-probabilities are not requested, so
    # it can come from the prefix cache.
    answer = await client.sample(
        tinker_types.ModelInput.from_ints(tokens),
        1,
        tinker_types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        prompt_logprobs_last_n=len(tokens) - len(episode.prompt_tokens),
    )
    sampled = sum(len(sequence.tokens) for sequence in answer.sequences)
    count(TokenUsage(cached=answer.prompt_cache_hit_tokens, sampled=sampled))
    logprobs = answer.prompt_logprobs or []
    if len(logprobs) != len(tokens):
        raise ValueError(f"{len(logprobs)} log-probabilities for {len(tokens)} tokens")
    values: list[float] = []
    position = len(episode.prompt_tokens)
    for turn in episode.turns:
        end = position + len(turn.sampled_tokens)
        scored = [value for value in logprobs[position:end] if value is not None]
        if len(scored) != end - position:
            raise ValueError("tokens without a log-probability")
        values += scored
        position = end + len(turn.appended_tokens)
    return np.asarray(values, dtype=np.float64)


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

    With two losses in a batch (see :class:`~searchr1_async.training.learner.Learner`), ``optim/loss`` is their sum and
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
