"""The learner: minibatches in, optimiser steps and new sampling weights out.

Calls on one training client are carried out in the order in which they are made, so nothing is awaited in between: a
minibatch's ``forward_backward`` is submitted when its groups are complete, the optimiser step right behind the last of
them, the new weights and the resume point right behind that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.config import LearningSettings, LossName, WeightsInFlight
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.errors import CheckpointError, ConfigurationError
from searchr1_async.events import BesideSampled, Emit, MinibatchLearned, MinibatchSubmitted, Notice
from searchr1_async.learn.advantages import advantages, token_weight
from searchr1_async.learn.calls import TrainingCalls, until_done, when_done
from searchr1_async.learn.examples import sampled_logprobs, to_datum, to_supervised_datum
from searchr1_async.learn.figures import LearnedMinibatch, learning_metrics, optimizer_metrics
from searchr1_async.learn.penalty import base_logprobs, kl_penalties
from searchr1_async.learn.schedule import learning_rate_at
from searchr1_async.usage import TokenUsage

_RESUME_POINT_TTL = 7 * 24 * 3600
"""Seconds that a service keeps a rolling resume point: a week, so that a run stopped on a Friday resumes on a Monday."""
FALLBACK_LOSS: LossName = "ppo"
"""For episodes that ``stable_reinforce`` cannot take."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """What a batch's learning gave."""

    metrics: dict[str, float]
    state_path: str
    """``tinker://`` path of the weights and the optimiser after the step."""
    sampler_path: str | None
    """``tinker://`` path of weights kept for sampling, where a checkpoint or a measurement was asked for."""


@dataclass(frozen=True, slots=True)
class _Example:
    """One episode as the trainer gets it."""

    datum: tinker_types.Datum
    episode: Episode
    kl_base: float
    """Sum over its sampled tokens of log p_sampled - log p_base; 0 without a penalty."""


@dataclass(frozen=True, slots=True)
class _Submitted:
    """Examples that were handed to the SDK in one request."""

    future: tinker.APIFuture[tinker_types.ForwardBackwardOutput]
    examples: list[_Example]
    has_penalty: bool
    is_fallback: bool | None

    async def learned(self) -> LearnedMinibatch:
        """With the service's answer, once it is there."""
        return LearnedMinibatch(
            await self.future,
            [one.episode for one in self.examples],
            _tokens(self.examples),
            sum(one.kl_base for one in self.examples) if self.has_penalty else None,
            self.is_fallback,
        )


@dataclass(slots=True)
class _Batch:
    """What was submitted for the batch under way."""

    minibatches: list[_Submitted] = field(default_factory=list)
    steps: list[tinker.APIFuture[tinker_types.OptimStepResponse]] = field(default_factory=list)
    unstepped: bool = False
    """Whether a minibatch came since the last optimiser step."""
    learning_rate: float = 0.0


class StepInProgress:
    """A batch whose calls have all been submitted: its new weights come first, its resume point and figures later."""

    def __init__(
        self,
        batch: _Batch,
        sampler: tinker.APIFuture[tinker.SamplingClient] | None,
        state: tinker.APIFuture[tinker_types.SaveWeightsResponse],
        kept: tinker.APIFuture[tinker_types.SaveWeightsForSamplerResponse] | None,
        calls: TrainingCalls,
    ) -> None:
        self._batch = batch
        self._sampler = sampler
        self._state = state
        self._kept = kept
        self._calls = calls

    async def published(self) -> tinker.SamplingClient | None:
        """Waits until the new weights can be sampled; None where the weights did not change.

        Raises:
            ServiceError: a training call failed.
        """
        if self._sampler is None:
            return None
        with self._calls.waiting("an optimiser step"):
            client = await self._sampler
            # Weights that lack a part of their batch must not be sampled. By now the service is done with all of it.
            for minibatch in self._batch.minibatches:
                await minibatch.future
            for step in self._batch.steps:
                await step
        return client

    async def finished(self) -> FinishedStep:
        """Waits until the step is done and its resume point kept by the service.

        Raises:
            ServiceError: a training call failed.
            CheckpointError: the checkpoint could not be saved.
        """
        batch = self._batch
        with self._calls.waiting("an optimiser step"):
            learned = [await one.learned() for one in batch.minibatches]
            steps = [await step for step in batch.steps]
        with self._calls.waiting("saving a checkpoint", CheckpointError):
            state_path = (await self._state).path
            sampler_path = (await self._kept).path if self._kept is not None else None
        metrics = optimizer_metrics([step.metrics or {} for step in steps])
        metrics |= await anyio.to_thread.run_sync(learning_metrics, learned)
        metrics["optim/lr"] = batch.learning_rate
        metrics["optim/steps"] = float(len(steps))
        batch.minibatches.clear()  # nobody asks for their episodes again, and there are thousands
        return FinishedStep(metrics, state_path, sampler_path)


class Learner:
    """One training client, and what was submitted to it for the batch under way. Called from one task.

    ``stable_reinforce`` takes only episodes whose every turn the service recorded in this session. The others of a batch
    (finished before a resume, or held for longer than the service remembers them) are trained on with ``ppo``, in a request of
    their own before the same optimiser step: the gradients add up, since both losses are sums over tokens.

    Args:
        loss: what is asked of the service; None is the one that the settings name, else ``importance_sampling``.
        weights_in_flight: which sampling clients :meth:`publish` makes; see
            :attr:`~searchr1_async.config.PipelineSettings.weights_in_flight`.
        base: samples from the base model, for the penalty of ``kl_coefficient``.

    Raises:
        ConfigurationError: a penalty is asked for without ``base``.
    """

    def __init__(
        self,
        client: tinker.TrainingClient,
        settings: LearningSettings,
        emit: Emit,
        *,
        loss: LossName | None = None,
        weights_in_flight: WeightsInFlight = "snapshot",
        base: tinker.SamplingClient | None = None,
    ) -> None:
        if settings.kl_coefficient > 0 and base is None:
            raise ConfigurationError("kl_coefficient needs a sampling client over the base model")
        self._client = client
        self._settings = settings
        self._emit = emit
        self._base = base if settings.kl_coefficient > 0 else None
        self._kind: WeightsInFlight = weights_in_flight
        self._calls = TrainingCalls(settings.training_deadline)
        self.loss: LossName = loss or settings.loss or "importance_sampling"
        """What is asked of the service."""
        self.when_learned: Callable[[], None] = lambda: None
        """Called when the trainer is done with a minibatch."""
        self.usage = TokenUsage()
        """What was asked of the service so far: trained tokens, and for a penalty the prompts that the base model read."""
        self._batch = _Batch()
        self._outstanding: list[tinker.APIFuture[Any]] = []

    async def submit(self, groups: Sequence[Group], step: int) -> None:
        """Submits one minibatch of groups that are all learned from; returns as soon as it is handed to the SDK.

        With a penalty it first waits for the base model's log-probabilities.

        Raises:
            ServiceError: the base model's log-probabilities could not be had.
        """
        settings = self._settings
        make = partial(_assemble, settings=settings, loss=self.loss)
        base: list[list[NDArray[np.float64]] | None] = [None] * len(groups)
        if self._base is not None:
            base = list(await self._base_logprobs(groups))
        examples: list[_Example] = []
        for group, logprobs in zip(groups, base, strict=True):
            # Off the event loop and a group at a time: 1.1 to 6.5 ms a trajectory were seen in the ancestor, 5.4 s in one
            # piece.
            examples += await anyio.to_thread.run_sync(make, group, logprobs)
        if not examples:
            return
        self._count_examples([one.datum for one in examples])
        for loss, those in self._by_loss(examples):
            # In a thread too: the call took 2.4 ms for 512 examples and 11 for 4,096. Only this task makes calls, so their
            # order stays.
            config = (dict(settings.loss_config) or None) if loss == self.loss else None
            datums = [one.datum for one in those]
            future = await anyio.to_thread.run_sync(self._client.forward_backward, datums, loss, config)
            self._watch(future)
            is_fallback = loss != self.loss if self.loss == "stable_reinforce" else None
            self._batch.minibatches.append(_Submitted(future, those, self._base is not None, is_fallback))
        self._batch.unstepped = True
        count, tokens = len(examples), _tokens(examples)
        self._emit(MinibatchSubmitted(step, len(groups), count, tokens))
        # The service carries requests out in their order: with the last, all are done.
        last = self._batch.minibatches[-1].future
        when_done(last, lambda: self._learned(MinibatchLearned(step, count, tokens)))

    def _by_loss(self, examples: list[_Example]) -> Iterator[tuple[LossName, list[_Example]]]:
        """The examples of each request, with its loss."""
        if self.loss != "stable_reinforce":
            yield self.loss, examples
            return
        recorded = [one for one in examples if one.datum.loss_fn_input_spans is not None]
        others = [one for one in examples if one.datum.loss_fn_input_spans is None]
        if recorded:
            yield self.loss, recorded
        if others:
            yield FALLBACK_LOSS, others

    def _learned(self, minibatch: MinibatchLearned) -> None:
        self._emit(minibatch)
        self.when_learned()

    @property
    def is_idle(self) -> bool:
        """Nothing that was submitted is unfinished at the service."""
        self._outstanding = [future for future in self._outstanding if not future.future().done()]
        return not self._outstanding

    async def wait_idle(self) -> None:
        """Waits until :attr:`is_idle`; may be cancelled without harm to what is under way. Errors surface elsewhere.

        Raises:
            ServiceError: the service was silent past the deadline.
        """
        with self._calls.waiting("a training call"):
            while not self.is_idle:
                await until_done(self._outstanding[-1])

    def end_part(self, step: int, total: int) -> None:
        """Steps the optimiser over what was submitted since its last step, if anything was.

        What is submitted later belongs to the next part of the batch.

        Args:
            step: the batch, counted from 1, of ``total``: they give the learning rate.
        """
        batch = self._batch
        if not batch.unstepped:
            return
        batch.unstepped = False
        batch.learning_rate = learning_rate_at(self._settings, step, total)
        batch.steps.append(self._client.optim_step(self._adam(batch.learning_rate, self._settings.gradient_clip)))
        self._watch(batch.steps[-1])

    async def finish_step(
        self, step: int, total: int, name: str, *, keep: bool, is_measured: bool = False
    ) -> StepInProgress:
        """Steps the optimiser over everything submitted, and asks for new sampling weights and the resume point.

        All is submitted at once, in this order; the next batch's minibatches may be submitted from then on. With nothing
        submitted (every group dropped) no optimiser step is made: the weights stay as they are, and a notice says so.

        Args:
            step: the batch, counted from 1, of ``total``; 0 saves the weights that the first batch starts from.
            name: of the checkpoint.
            keep: the checkpoint stays for good, with weights for sampling under this name.
            is_measured: weights for sampling are saved at any rate: the unsaved ones that are sampled from next may be gone when
                a measurement comes to them (the embedded service holds the 16 that were used last). The state has no expiry
                either, since these weights may turn out to be the best.
        """
        self.end_part(step, total)
        batch, self._batch = self._batch, _Batch()
        if not batch.steps and step > 0:
            self._emit(Notice(f"step {step}: no group to learn from, so the weights stay as they are", is_warning=True))
        sampler = self.publish() if batch.steps else None
        is_kept = keep or is_measured
        state = self._client.save_state(name, ttl_seconds=None if is_kept else _RESUME_POINT_TTL, overwrite=True)
        kept = self._client.save_weights_for_sampler(name) if is_kept else None
        for future in (sampler, state, kept):
            if future is not None:
                self._watch(future)
        return StepInProgress(batch, sampler, state, kept, self._calls)

    def publish(self) -> tinker.APIFuture[tinker.SamplingClient]:
        """Asks for a client that samples from the weights as they are, to play groups with that are trained on."""
        return self._client.save_weights_and_get_sampling_client(
            record_stability_info=self.loss == "stable_reinforce", kind=self._kind
        )

    async def published(self) -> tinker.SamplingClient:
        """The client of :meth:`publish`, once it is there.

        Raises:
            ServiceError: the weights could not be published.
        """
        with self._calls.waiting("publishing the weights"):
            return await self.publish()

    async def keep_weights(self, name: str) -> tuple[str, str]:
        """Saves the weights as they are for good; returns the ``tinker://`` paths of the training state and for sampling.

        Raises:
            CheckpointError: they could not be saved.
        """
        with self._calls.waiting("saving a checkpoint", CheckpointError):
            state = self._client.save_state(name, overwrite=True)
            sampler = self._client.save_weights_for_sampler(name)
            return (await state).path, (await sampler).path

    async def save_state(self, name: str) -> str:
        """Saves the weights and the optimizer as they are, for a resume; returns their ``tinker://`` path.

        Raises:
            CheckpointError: they could not be saved.
        """
        with self._calls.waiting("saving a checkpoint", CheckpointError):
            return (await self._client.save_state(name, ttl_seconds=_RESUME_POINT_TTL, overwrite=True)).path

    async def supervised_step(self, episodes: Sequence[Episode], learning_rate: float) -> float:
        """One cross-entropy step on demonstrations; returns the mean loss a token.

        Raises:
            ServiceError: a training call failed.
        """
        datums = [await anyio.to_thread.run_sync(to_supervised_datum, episode) for episode in episodes]
        trained = self._count_examples(datums)
        future = self._client.forward_backward(datums, "cross_entropy")
        self._emit(MinibatchSubmitted(0, 0, len(datums), trained))
        optim = self._client.optim_step(self._adam(learning_rate, gradient_clip=0.0))
        with self._calls.waiting("a warm-up step"):
            output = await future
            self._emit(MinibatchLearned(0, len(datums), trained))
            await optim
        tokens = sum(episode.action_token_count for episode in episodes)
        return float(output.metrics["loss:sum"]) / max(1, tokens)

    def pause(self, is_paused: bool) -> None:
        """Holds the time limits of training calls, or lets them go on; the calls themselves go on."""
        self._calls.pause(is_paused)

    def _count(self, usage: TokenUsage) -> None:
        self.usage += usage

    def _count_examples(self, datums: Sequence[tinker_types.Datum]) -> int:
        """The tokens of examples that are about to be trained on. Billed is an example's input, which lacks its last token."""
        tokens = sum(datum.model_input.length + 1 for datum in datums)
        self._count(TokenUsage(trained=tokens - len(datums)))
        return tokens

    def _adam(self, learning_rate: float, gradient_clip: float) -> tinker_types.AdamParams:
        settings = self._settings
        return tinker_types.AdamParams(
            learning_rate=learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.epsilon,
            grad_clip_norm=gradient_clip,
        )

    def _watch(self, future: tinker.APIFuture[Any]) -> None:
        # Not the finished ones: each holds its answer, 6 KB an example.
        self._outstanding = [one for one in self._outstanding if not one.future().done()] + [future]

    async def _base_logprobs(self, groups: Sequence[Group]) -> list[list[NDArray[np.float64]]]:
        """For each group, for each member, of its sampled tokens [A]."""
        assert self._base is not None
        episodes = [episode for group in groups for episode in group.episodes]
        before = self.usage
        found = iter(await base_logprobs(self._base, episodes, self._calls, count=self._count))
        read = self.usage - before  # this task alone asks for learning
        self._emit(BesideSampled(read.prompt, read.cached, read.sampled))
        return [[next(found) for _ in group.episodes] for group in groups]


def _assemble(
    group: Group,
    base: Sequence[NDArray[np.float64]] | None,
    *,
    settings: LearningSettings,
    loss: LossName,
) -> list[_Example]:
    """A group's examples for this loss."""
    differences = [
        sampled_logprobs(episode) - logprobs_A
        for episode, logprobs_A in zip(group.episodes, base or (), strict=base is not None)
    ]
    penalties: list[NDArray[np.float64]] | list[float] = [0.0] * len(group.episodes)
    kl_base = [0.0] * len(group.episodes)
    if base is not None:
        penalties = kl_penalties(differences, settings.kl_coefficient)
        kl_base = [float(values_A.sum()) for values_A in differences]
    examples: list[_Example] = []
    for episode, advantage, penalty, kl in zip(
        group.episodes, advantages(group.rewards, settings.advantage), penalties, kl_base, strict=True
    ):
        if episode.turns:  # an episode whose prompt did not fit has nothing that was sampled
            weight = token_weight(episode.action_token_count, settings.normalization)
            datum = to_datum(
                episode,
                (advantage + penalty) * weight,
                with_ratio_mask=loss == "gspo",
                with_provenance=loss == "stable_reinforce",
            )
            examples.append(_Example(datum, episode, kl))
    return examples


def _tokens(examples: Sequence[_Example]) -> int:
    """Of all of them, what was only read included."""
    return sum(one.datum.model_input.length + 1 for one in examples)
