"""A penalty on leaving the base model, token by token, as part of the advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio
import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ServiceError
from searchr1_async.learn.calls import TrainingCalls
from searchr1_async.usage import TokenUsage

_AT_ONCE = 64
"""Requests to the base model under way: enough to keep it busy, few enough that samples do not queue behind them."""


def kl_penalties(differences: Sequence[NDArray[np.float64]], coefficient: float) -> list[NDArray[np.float64]]:
    """What is added to the advantage of each sampled token of a group.

    ``coefficient * (mean - (log p_sampled - log p_base))``: less where the policy makes a token likelier than the base
    model does. The mean is over the group's sampled tokens, so that a group's penalties sum to 0 and do not depend on what
    else is in its minibatch. tinker-cookbook (``incorporate_kl_penalty``) has the same term, centred over the whole batch:
    with streamed minibatches that mean is not known when the first of them goes out.

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
    """Log-probabilities of each episode's sampled tokens [A] under the model behind ``client``.

    One request an episode, of which up to 64 are under way.

    Args:
        calls: the time limit for all of them together.
        count: gets the tokens of each request as they become known: its prompt when it is asked, what of it was cached and the
            one token that is sampled beside it when it is answered.

    Raises:
        ServiceError: the service refused, failed for good, or was silent past the deadline.
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

    with calls.waiting("asking for the base model's log-probabilities"):
        async with anyio.create_task_group() as tasks:
            for place, episode in enumerate(episodes):
                if episode.turns:
                    tasks.start_soon(one, place, tasks.cancel_scope)
    if failures:
        error = failures[0]
        raise ServiceError(
            f"the Tinker service gave no log-probabilities of the base model: {fault_text(error)}"
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
    # As the SDK's own compute_logprobs, which does not say what was cached. Of the prompt nothing is asked, so the service may
    # serve it from its prefix cache.
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
