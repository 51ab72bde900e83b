"""The learner: minibatches in, optimiser steps and new sampling weights out.

Calls on one training client are carried out in the order in which they are made, so nothing is awaited in between: a
minibatch's ``forward_backward`` is submitted when its groups are complete, the optimiser step right behind the last of
them, the new weights and the resume point right behind that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import numpy as np
import tinker
from tinker import types as tinker_types

from searchr1_async.config import LearningSettings
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.errors import CheckpointError, ServiceError
from searchr1_async.events import Emit, GroupDropped, MinibatchSubmitted
from searchr1_async.learn.advantages import centred_advantages
from searchr1_async.learn.examples import to_datum, to_supervised_datum
from searchr1_async.learn.minibatches import drop_reason

_RESUME_POINT_TTL = 7 * 24 * 3600
"""Seconds that a service keeps a rolling resume point: a week, so that a run stopped on a Friday resumes on a Monday."""
TRAINING_DEADLINE = 3600.0
"""Seconds for one step's training calls in all; a service that needs longer is taken for dead."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """What an optimiser step gave."""

    metrics: dict[str, float]
    sampling_client: tinker.SamplingClient
    """Over the new weights."""
    state_path: str
    """``tinker://`` path of the weights and the optimiser after the step."""
    sampler_path: str | None
    """``tinker://`` path of weights kept for sampling, where a checkpoint was asked for."""


class Learner:
    """One training client and what was submitted to it for the step under way."""

    def __init__(self, client: tinker.TrainingClient, settings: LearningSettings, emit: Emit) -> None:
        self._client = client
        self._settings = settings
        self._emit = emit
        self._pending: list[tuple[tinker.APIFuture[tinker_types.ForwardBackwardOutput], list[Episode]]] = []
        self.reasons: dict[str, int] = {}
        """Groups of this step left out of learning, by reason."""

    async def submit(self, groups: Sequence[Group], step: int) -> None:
        """Submits one minibatch; returns as soon as it is handed to the SDK."""
        trained: list[Group] = []
        for group in groups:
            reason = drop_reason(group, drop_constant_groups=self._settings.drop_constant_groups)
            if reason is None:
                trained.append(group)
            else:
                self.reasons[reason] = self.reasons.get(reason, 0) + 1
                self._emit(GroupDropped(group, step, reason))
        if not trained:
            return
        # Off the event loop: 1.1 to 6.5 ms a trajectory were seen in the ancestor, 5.4 s in one piece.
        datums, episodes = await anyio.to_thread.run_sync(_assemble, trained)
        if not datums:
            return
        future = self._client.forward_backward(
            datums, self._settings.loss, loss_fn_config=dict(self._settings.loss_config) or None
        )
        self._pending.append((future, episodes))
        self._emit(MinibatchSubmitted(step, len(trained), len(datums), sum(len(e.tokens) for e in episodes)))

    async def finish_step(self, name: str, *, keep: bool) -> FinishedStep:
        """Steps the optimiser over everything submitted, publishes the weights and saves the resume point.

        With nothing submitted (every group dropped) no optimiser step is made: the weights stay as they are.

        Args:
            name: of the checkpoint.
            keep: also save weights for sampling under this name, for good.

        Raises:
            ServiceError: a training call failed.
            CheckpointError: the checkpoint could not be saved.
        """
        pending, self._pending = self._pending, []
        reasons, self.reasons = self.reasons, {}
        settings = self._settings
        adam = tinker_types.AdamParams(
            learning_rate=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.epsilon,
            grad_clip_norm=settings.gradient_clip,
        )
        optim = self._client.optim_step(adam) if pending else None
        sampler = self._client.save_weights_and_get_sampling_client()
        state = self._client.save_state(name, ttl_seconds=None if keep else _RESUME_POINT_TTL, overwrite=True)
        kept = self._client.save_weights_for_sampler(name) if keep else None
        with training_faults("an optimiser step"):
            with anyio.fail_after(TRAINING_DEADLINE):
                outputs = [(await future, episodes) for future, episodes in pending]
                optim_result = await optim if optim is not None else None
                sampling_client = await sampler
        with training_faults("saving a checkpoint", CheckpointError):
            with anyio.fail_after(TRAINING_DEADLINE):
                state_path = (await state).path
                sampler_path = (await kept).path if kept is not None else None
        metrics = await anyio.to_thread.run_sync(learning_metrics, outputs)
        metrics["optim/lr"] = settings.learning_rate if optim is not None else 0.0
        metrics["optim/steps"] = float(optim is not None)
        for reason in ("constant_reward", "too_few_episodes"):
            metrics[f"groups/dropped/{reason}"] = float(reasons.get(reason, 0))
        if optim_result is not None and optim_result.metrics:
            metrics.update({f"optim/{key}": float(value) for key, value in optim_result.metrics.items()})
        return FinishedStep(metrics, sampling_client, state_path, sampler_path)

    async def keep_sampler(self, name: str) -> str:
        """Saves the weights as they are for sampling, for good; returns their ``tinker://`` path.

        Raises:
            CheckpointError: they could not be saved.
        """
        with training_faults("saving a checkpoint", CheckpointError):
            with anyio.fail_after(TRAINING_DEADLINE):
                return (await self._client.save_weights_for_sampler(name)).path

    async def supervised_step(self, episodes: Sequence[Episode], learning_rate: float) -> float:
        """One cross-entropy step on demonstrations; returns the mean loss a token.

        Raises:
            ServiceError: a training call failed.
        """
        datums = [to_supervised_datum(episode) for episode in episodes]
        future = self._client.forward_backward(datums, "cross_entropy")
        optim = self._client.optim_step(
            tinker_types.AdamParams(
                learning_rate=learning_rate,
                beta1=self._settings.beta1,
                beta2=self._settings.beta2,
                eps=self._settings.epsilon,
            )
        )
        with training_faults("a warm-up step"):
            with anyio.fail_after(TRAINING_DEADLINE):
                output = await future
                await optim
        tokens = sum(episode.action_token_count for episode in episodes)
        return float(output.metrics["loss:sum"]) / max(1, tokens)


class training_faults:  # noqa: N801
    """Names what was being done when the SDK fails, as one of our own errors."""

    def __init__(self, doing: str, error: type[Exception] = ServiceError) -> None:
        self._doing, self._error = doing, error

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TimeoutError):
            raise self._error(f"{self._doing} took over {TRAINING_DEADLINE:g} s at the Tinker service") from error
        if isinstance(error, tinker.TinkerError | ValueError | KeyError):
            raise self._error(f"{self._doing} failed at the Tinker service: {type(error).__name__}: {error}") from error


def _assemble(groups: Sequence[Group]) -> tuple[list[tinker_types.Datum], list[Episode]]:
    datums: list[tinker_types.Datum] = []
    episodes: list[Episode] = []
    for group in groups:
        for episode, advantage in zip(group.episodes, centred_advantages(group.rewards), strict=True):
            if episode.turns:  # an episode whose prompt did not fit has nothing that was sampled
                datums.append(to_datum(episode, advantage))
                episodes.append(episode)
    return datums, episodes


def learning_metrics(
    outputs: Sequence[tuple[tinker_types.ForwardBackwardOutput, Sequence[Episode]]],
) -> dict[str, float]:
    """The recipe's optimiser metrics, over all sampled tokens of a step at once (not a mean of minibatch means).

    ``optim/entropy``: mean of -log p(sampled token) under the sampler. ``optim/kl_sample_train_v1``: mean of
    log p_sampler - log p_trainer; ``v2``: half the mean of its square (Schulman, 2020, "Approximating KL Divergence",
    estimators k1 and k2). Both are 0 for an exact service before the first step on new data.
    """
    sampled: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    loss = 0.0
    for output, episodes in outputs:
        loss += float(output.metrics.get("loss:sum", 0.0))
        for record, episode in zip(output.loss_fn_outputs, episodes, strict=True):
            logprobs_T = np.asarray(record["logprobs"].to_numpy(), dtype=np.float64)
            position = len(episode.prompt_tokens) - 1
            for turn in episode.turns:
                count = len(turn.sampled_tokens)
                trained.append(logprobs_T[position : position + count])
                sampled.append(np.asarray(turn.logprobs, dtype=np.float64))
                position += count + len(turn.appended_tokens)
    if not sampled:
        return {"optim/tokens": 0.0}
    sampled_A, trained_A = np.concatenate(sampled), np.concatenate(trained)
    difference_A = sampled_A - trained_A
    return {
        "optim/loss": loss,
        "optim/tokens": float(len(sampled_A)),
        "optim/datums": float(sum(len(episodes) for _, episodes in outputs)),
        "optim/entropy": float(-sampled_A.mean()),
        "optim/kl_sample_train_v1": float(difference_A.mean()),
        "optim/kl_sample_train_v2": float(0.5 * np.square(difference_A).mean()),
    }
