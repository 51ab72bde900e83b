"""Checks optional abilities of a Tinker service before work starts: losses, in-flight weights, prompt log-probabilities.

The embedded service has them all. Others, Tinker's cloud included, are probed, without changing weights, gradients or optimiser.
A plain run probes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import get_args

import anyio
import tinker
from tinker import types as tinker_types

from searchr1_async.boundary.network import SDK_FAULTS, fault_text, fault_words
from searchr1_async.config import LearningSettings, LossName, PipelineSettings
from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.errors import ConfigurationError, ServiceError
from searchr1_async.events import Emit, Notice
from searchr1_async.runs.checkpoints import ResumePoint
from searchr1_async.service.connection import Service
from searchr1_async.training.examples import to_datum
from searchr1_async.training.job import TrainingJob
from searchr1_async.training.learner import FALLBACK_LOSS

PROBE_SECONDS = 300.0
"""Seconds per probe."""
_PROMPT = (0, 1)
"""Token ids that every vocabulary has."""
_REFUSING = (400, 404, 405, 422, 501)
"""HTTP statuses that mean the service does not support a request, not that it failed just now."""


def preferred_losses(learning: LearningSettings, pipeline: PipelineSettings) -> tuple[LossName, ...]:
    """The acceptable losses of a run, best first; see :attr:`LearningSettings.loss`."""
    if learning.loss is not None:
        return (learning.loss,)
    if pipeline.is_off_policy:
        # A loss_config without a loss is meant for the clipped loss.
        return ("ppo",) if learning.loss_config else ("stable_reinforce", "ppo")
    return ("ppo",) if learning.optimizer_steps > 1 else ("importance_sampling",)


async def choose_loss(
    service: Service, client: tinker.TrainingClient, job: TrainingJob, point: ResumePoint | None, emit: Emit
) -> LossName:
    """Chooses the run's loss, after checking that the service supports everything the run needs.

    Args:
        client: the run's.
        point: a resumed run's, which keeps its loss.
        emit: receives a notice if there was a choice.

    Raises:
        ConfigurationError: the service lacks something; names it and the alternatives.
        ServiceError: the service does not answer.
    """
    learning, pipeline = job.learning, job.pipeline
    wanted: tuple[LossName, ...] = preferred_losses(learning, pipeline)
    if point is not None:
        wanted = (_loss_of(point, learning, pipeline),)
    refusals: dict[LossName, str] = {}
    if not service.is_local:
        await _refuse_missing(service, client, job)
        if wanted != ("importance_sampling",):
            refusals = await _refusals(client, wanted, learning.loss_config)
    left: list[LossName] = [loss for loss in wanted if loss not in refusals]
    if not left:
        raise ConfigurationError(await _no_loss_message(client, refusals))
    if len(wanted) > 1:
        emit(Notice(_reason(left[0], refusals)))
    return left[0]


def _loss_of(point: ResumePoint, learning: LearningSettings, pipeline: PipelineSettings) -> LossName:
    if point.loss is not None:
        return point.loss
    # A run of an earlier version, with that version's rule.
    if learning.loss is not None:
        return learning.loss
    return "ppo" if pipeline.max_staleness > 0 or learning.optimizer_steps > 1 else "importance_sampling"


def _reason(loss: LossName, refusals: Mapping[LossName, str]) -> str:
    why = "groups may be sampled from older weights"
    if refusals:
        answer = "; ".join(f"no {name}: {refusal}" for name, refusal in refusals.items())
        return f"the loss is {loss}, which is clipped, because {why} (the service has {answer})"
    return f"the loss is {loss}, because {why}"


async def _no_loss_message(client: tinker.TrainingClient, refusals: Mapping[LossName, str]) -> str:
    answers = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
    others: tuple[LossName, ...] = tuple(name for name in get_args(LossName) if name not in refusals)
    lacking = await _refusals(client, others, {}, first_only=False)
    found = [name for name in others if name not in lacking]
    instead = f"it has {', '.join(found)}: choose one with loss=…" if found else "it has none of the others either"
    return f"this service does not support the run's loss ({answers}); {instead}"


async def _refusals(
    client: tinker.TrainingClient,
    losses: tuple[LossName, ...],
    config: Mapping[str, float],
    *,
    first_only: bool = True,
) -> dict[LossName, str]:
    """The losses the service refused, with its messages; with ``first_only`` stops at the first supported loss."""
    refusals: dict[LossName, str] = {}
    for loss in losses:
        refusal = await _refusal(f"the loss {loss}", lambda loss=loss: _compute(client, loss, config))
        if refusal is None and loss == "stable_reinforce":
            refusal = await _refusal(f"the loss {FALLBACK_LOSS}", lambda: _compute(client, FALLBACK_LOSS, {}))
        if refusal is not None:
            refusals[loss] = refusal
        elif first_only:
            break
    return refusals


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


async def _refuse_missing(service: Service, client: tinker.TrainingClient, job: TrainingJob) -> None:
    if job.pipeline.weights_in_flight == "inflight":

        async def save() -> None:
            await client.save_weights_and_get_sampling_client(kind="inflight")

        if refusal := await _refusal("sampling weights in flight", save):
            raise ConfigurationError(
                f"this service has no sampling clients with in-flight weight updates ({refusal}): choose "
                'weights_in_flight="snapshot"'
            )
    if job.learning.kl_coefficient:
        base = await service.create_sampling_client()

        async def score() -> None:
            await base.compute_logprobs(tinker_types.ModelInput.from_ints(list(_PROMPT)))

        if refusal := await _refusal("log-probabilities of the base model", score):
            raise ConfigurationError(
                f"this service does not compute log-probabilities of a prompt ({refusal}), which the KL penalty needs: choose "
                "kl_coefficient=0"
            )


async def _refusal(what: str, attempt: Callable[[], Awaitable[None]]) -> str | None:
    """The service's refusal as text, None if it succeeded; :class:`ServiceError` if it failed otherwise."""
    try:
        with anyio.fail_after(PROBE_SECONDS):
            await attempt()
    except tinker.APIStatusError as error:
        if error.status_code not in _REFUSING:
            raise ServiceError(f"trying {what} failed at the Tinker service: {fault_text(error)}") from error
        return fault_words(error)
    except TimeoutError as error:
        raise ServiceError(f"trying {what}: the Tinker service did not answer within {PROBE_SECONDS:g} s") from error
    except (tinker.RequestFailedError, ValueError, AssertionError) as error:
        return fault_words(error)
    except SDK_FAULTS as error:
        raise ServiceError(f"trying {what} failed at the Tinker service: {fault_text(error)}") from error
    return None
