"""Token-level KL penalty towards the base model, added to the advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio
import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.network import SDK_FAULTS, fault_text
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ServiceError
from searchr1_async.service.connection import TrainingCalls

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
