"""What a run asks of a Tinker service beyond the plain: found out before work starts, refused by name where it is missing.

The embedded service is known to have all of it. Others are asked by trying, Tinker's cloud too, where an account may lack what
is new there: what is tried leaves the weights, the gradients and the optimiser as they are. Nothing is tried for a plain run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import get_args

import anyio
import tinker
from tinker import types as tinker_types

from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text, fault_words
from searchr1_async.config import LearningSettings, LossName, PipelineSettings
from searchr1_async.connection import Service
from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.errors import ConfigurationError, ServiceError
from searchr1_async.events import Emit, Notice
from searchr1_async.job import TrainingJob
from searchr1_async.learn.checkpoints import ResumePoint
from searchr1_async.learn.examples import to_datum
from searchr1_async.learn.learner import FALLBACK_LOSS

TRY_SECONDS = 300.0
"""For each thing that is tried."""
_PROMPT = (0, 1)
"""Ids that are in every vocabulary."""
_REFUSING = (400, 404, 405, 422, 501)
"""HTTP statuses that say that a service does not do this, not that it cannot do it just now."""


def preferred_losses(learning: LearningSettings, pipeline: PipelineSettings) -> tuple[LossName, ...]:
    """The losses that a run may learn with, best first; see :attr:`LearningSettings.loss`."""
    if learning.loss is not None:
        return (learning.loss,)
    if pipeline.is_off_policy:
        # A configuration without a name was written for the clipped loss.
        return ("ppo",) if learning.loss_config else ("stable_reinforce", "ppo")
    return ("ppo",) if learning.optimizer_steps > 1 else ("importance_sampling",)


async def choose_loss(
    service: Service, client: tinker.TrainingClient, job: TrainingJob, point: ResumePoint | None, emit: Emit
) -> LossName:
    """The loss that the run learns with, once the service is known to do all that the run asks of it.

    Args:
        client: of the run.
        point: of a run that is resumed: it keeps its loss.
        emit: gets one notice where the loss was chosen here and might have been another.

    Raises:
        ConfigurationError: the service lacks something, with its name and with what can be used instead.
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
        raise ConfigurationError(await _no_loss(client, refusals))
    if len(wanted) > 1:
        emit(Notice(_reason(left[0], refusals)))
    return left[0]


def _loss_of(point: ResumePoint, learning: LearningSettings, pipeline: PipelineSettings) -> LossName:
    if point.loss is not None:
        return point.loss
    # A run of an earlier version, which had this rule.
    if learning.loss is not None:
        return learning.loss
    return "ppo" if pipeline.max_staleness > 0 or learning.optimizer_steps > 1 else "importance_sampling"


def _reason(loss: LossName, refusals: Mapping[LossName, str]) -> str:
    why = "groups may come from older weights than the newest"
    if refusals:
        answer = "; ".join(f"no {name}: {refusal}" for name, refusal in refusals.items())
        return f"the loss is {loss}, which is clipped, since {why} (the service has {answer})"
    return f"the loss is {loss}, since {why}"


async def _no_loss(client: tinker.TrainingClient, refusals: Mapping[LossName, str]) -> str:
    answers = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
    others: tuple[LossName, ...] = tuple(name for name in get_args(LossName) if name not in refusals)
    lacking = await _refusals(client, others, {}, first_only=False)
    found = [name for name in others if name not in lacking]
    instead = f"it has {', '.join(found)}: name one with loss=…" if found else "it has none of the others either"
    return f"this service does not compute the loss that the run learns with ({answers}); {instead}"


async def _refusals(
    client: tinker.TrainingClient,
    losses: tuple[LossName, ...],
    config: Mapping[str, float],
    *,
    first_only: bool = True,
) -> dict[LossName, str]:
    """The losses that the service refused, with its words.

    Args:
        config: of the loss.
        first_only: ends with the first that it has.
    """
    refusals: dict[LossName, str] = {}
    for loss in losses:
        refusal = await _tried(f"the loss {loss}", lambda loss=loss: _compute(client, loss, config))
        if refusal is None and loss == "stable_reinforce":
            refusal = await _tried(f"the loss {FALLBACK_LOSS}", lambda: _compute(client, FALLBACK_LOSS, {}))
        if refusal is not None:
            refusals[loss] = refusal
        elif first_only:
            break
    return refusals


async def _compute(client: tinker.TrainingClient, loss: LossName, config: Mapping[str, float]) -> None:
    """The loss of one token, without its gradient."""
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

        if refusal := await _tried("sampling weights in flight", save):
            raise ConfigurationError(
                f"this service has no sampling clients whose weights move on ({refusal}): choose "
                'weights_in_flight="snapshot"'
            )
    if job.learning.kl_coefficient:
        base = await service.create_sampling_client()

        async def score() -> None:
            await base.compute_logprobs(tinker_types.ModelInput.from_ints(list(_PROMPT)))

        if refusal := await _tried("log-probabilities of the base model", score):
            raise ConfigurationError(
                f"this service gives no log-probabilities of a prompt ({refusal}), which the penalty needs: choose "
                "kl_coefficient=0"
            )


async def _tried(what: str, attempt: Callable[[], Awaitable[None]]) -> str | None:
    """The service's refusal in words; None where it did it.

    Raises:
        ServiceError: it could not be asked.
    """
    try:
        with anyio.fail_after(TRY_SECONDS):
            await attempt()
    except tinker.APIStatusError as error:
        if error.status_code not in _REFUSING:
            raise ServiceError(f"trying {what} failed at the Tinker service: {fault_text(error)}") from error
        return fault_words(error)
    except TimeoutError as error:
        raise ServiceError(f"trying {what}: the Tinker service did not answer within {TRY_SECONDS:g} s") from error
    except (tinker.RequestFailedError, ValueError, AssertionError) as error:
        return fault_words(error)
    except SDK_FAULTS as error:
        raise ServiceError(f"trying {what} failed at the Tinker service: {fault_text(error)}") from error
    return None
