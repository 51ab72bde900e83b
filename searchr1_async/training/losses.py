"""The loss of a run, chosen once it is known what the service supports; and the base model's log-probabilities, for the KL penalty.

The embedded service has every loss; others, Tinker's cloud included, are tried first, without changing weights, gradients or
optimizer. A plain run tries nothing. Shape: A sampled tokens of an episode.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import get_args

import anyio
import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text, fault_words
from searchr1_async.config import LearningSettings, LossName, PipelineSettings
from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.errors import ConfigurationError, ServiceError, ungrouped
from searchr1_async.events import Emit, Notice
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.service.connection import Service, TrainingCalls
from searchr1_async.training.batches import at_sampled, scored_tokens, to_datum

FALLBACK_LOSS: LossName = "ppo"
"""For episodes that ``stable_reinforce`` cannot train on."""
PROBE_SECONDS = 300.0
"""Seconds per probe."""
_PROMPT = (0, 1)
"""Token ids that every vocabulary has."""
_REFUSING = (400, 404, 405, 422, 501)
"""HTTP statuses that mean the service does not support a request, not that it failed just now."""
_AT_ONCE = 64
"""Concurrent requests to the base model: enough to keep it busy without delaying samples."""


def preferred_losses(learning: LearningSettings, pipeline: PipelineSettings) -> tuple[LossName, ...]:
    """The acceptable losses of a run, best first; see :attr:`LearningSettings.loss`."""
    if learning.loss is not None:
        return (learning.loss,)
    if pipeline.is_off_policy:
        # A loss_config without a loss is meant for the clipped loss.
        return ("ppo",) if learning.loss_config else ("stable_reinforce", "ppo")
    return ("ppo",) if learning.optimizer_steps > 1 else ("importance_sampling",)


async def choose_loss(
    service: Service,
    client: tinker.TrainingClient,
    learning: LearningSettings,
    pipeline: PipelineSettings,
    *,
    point: ResumePoint | None,
    emit: Emit,
) -> LossName:
    """Chooses the run's loss, after checking that the service supports everything the run needs."""
    wanted: tuple[LossName, ...] = preferred_losses(learning, pipeline)
    if point is not None:
        wanted = (_loss_of(point, learning, pipeline),)
    refusals: dict[LossName, str] = {}
    if not service.is_local:
        await _refuse_missing(service, client, learning, pipeline)
    if not service.is_local and wanted != ("importance_sampling",):
        for loss in wanted:
            if (refusal := await _loss_refusal(client, loss, learning.loss_config)) is None:
                break
            refusals[loss] = refusal
    found: LossName | None = next((loss for loss in wanted if loss not in refusals), None)
    answers = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
    if found is None:
        others: list[LossName] = [name for name in get_args(LossName) if name not in refusals]
        offered = [name for name in others if await _loss_refusal(client, name, {}) is None]
        raise ConfigurationError(
            f"this service does not support the run's loss ({answers}); it has {', '.join(offered) or 'no other'}: choose one "
            "with loss=…"
        )
    if len(wanted) > 1:
        why = f" (the service refused {answers})" if refusals else ""
        emit(Notice(f"the loss is {found}, because groups may be sampled from older weights{why}"))
    return found


def _loss_of(point: ResumePoint, learning: LearningSettings, pipeline: PipelineSettings) -> LossName:
    if point.loss is not None:
        return point.loss
    # A run of an earlier version, with that version's rule.
    is_clipped = pipeline.max_staleness > 0 or learning.optimizer_steps > 1
    return learning.loss or ("ppo" if is_clipped else "importance_sampling")


async def _loss_refusal(client: tinker.TrainingClient, loss: LossName, config: Mapping[str, float]) -> str | None:
    """The service's refusal of a loss, and of the one it falls back to; None if it has both."""
    refusal = await _refusal(f"the loss {loss}", lambda: _compute(client, loss, config))
    if refusal is None and loss == "stable_reinforce":
        return await _refusal(f"the loss {FALLBACK_LOSS}", lambda: _compute(client, FALLBACK_LOSS, {}))
    return refusal


async def _compute(client: tinker.TrainingClient, loss: LossName, config: Mapping[str, float]) -> None:
    """Computes the loss of one token, without its gradient."""
    turn = Turn(_PROMPT[:1], (-1.0,), "")
    if loss == "stable_reinforce":
        sampler = await client.save_weights_and_get_sampling_client(record_stability_info=True)
        prompt = tinker_types.ModelInput.from_ints(list(_PROMPT))
        sampled = (await sampler.sample(prompt, 1, tinker_types.SamplingParams(max_tokens=1))).sequences[0]
        turn = Turn(tuple(sampled.tokens), tuple(sampled.logprobs or ()), "", sequence_id=sampled.sequence_id)
    episode = Episode(Question("", "?", ("?",)), _PROMPT, (turn,), StopReason.ANSWER)
    datum = to_datum(episode, 1.0, with_ratio_mask=loss == "gspo", with_provenance=loss == "stable_reinforce")
    await client.forward([datum], loss, dict(config) or None)


async def _refuse_missing(
    service: Service, client: tinker.TrainingClient, learning: LearningSettings, pipeline: PipelineSettings
) -> None:
    async def publish() -> None:
        await client.save_weights_and_get_sampling_client(kind="inflight")

    async def score() -> None:
        base = await service.create_sampling_client()
        await base.compute_logprobs(tinker_types.ModelInput.from_ints(list(_PROMPT)))

    if pipeline.weights_in_flight == "inflight":
        what = "sampling clients with in-flight weight updates"
        await _require(what, publish, 'weights_in_flight="snapshot"')
    if learning.kl_coefficient:
        await _require("log-probabilities of a prompt, which the KL penalty needs", score, "kl_coefficient=0")


async def _require(what: str, attempt: Callable[[], Awaitable[None]], instead: str) -> None:
    if refusal := await _refusal(what, attempt):
        raise ConfigurationError(f"this service has no {what} ({refusal}): choose {instead}")


async def _refusal(what: str, attempt: Callable[[], Awaitable[None]]) -> str | None:
    """The service's refusal as text, None if it succeeded; :class:`ServiceError` if it failed otherwise."""
    try:
        with anyio.fail_after(PROBE_SECONDS):
            await attempt()
    except TimeoutError as error:
        raise ServiceError(f"trying {what}: the Tinker service did not answer within {PROBE_SECONDS:g} s") from error
    except SDK_FAULTS as error:
        refuses = isinstance(error, tinker.RequestFailedError | ValueError | AssertionError)
        if refuses or (isinstance(error, tinker.APIStatusError) and error.status_code in _REFUSING):
            return fault_words(error)
        raise ServiceError(f"trying {what} failed at the Tinker service: {fault_text(error)}") from error
    return None


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
    """
    found: list[NDArray[np.float64]] = [np.empty(0) for _ in episodes]
    slots = anyio.Semaphore(_AT_ONCE)

    async def one(place: int, episode: Episode) -> None:
        async with slots:
            try:
                found[place] = await _sampled_base_logprobs(client, episode, count)
            except SDK_FAULTS as error:
                raise ServiceError(
                    f"the Tinker service returned no log-probabilities of the base model: {fault_text(error)}"
                ) from error

    with calls.waiting("computing the base model's log-probabilities"), ungrouped():
        async with anyio.create_task_group() as tasks:
            for place, episode in enumerate(episodes):
                if episode.turns:
                    tasks.start_soon(one, place, episode)
    return found


async def _sampled_base_logprobs(
    client: tinker.SamplingClient, episode: Episode, count: Callable[[TokenUsage], None]
) -> NDArray[np.float64]:
    tokens = scored_tokens(episode).tolist()
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
    values_A = at_sampled(episode, np.asarray(logprobs[1:], dtype=np.float64))  # a missing one is NaN
    if np.isnan(values_A).any():
        raise ValueError("tokens without a log-probability")
    return values_A
