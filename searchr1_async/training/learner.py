"""The learner: minibatches in, optimizer steps and new sampling weights out.

A training client executes calls in submission order, so nothing is awaited in between: ``forward_backward`` is submitted
as soon as a minibatch's groups are complete, then the optimizer step, the new weights and the resume point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import anyio
import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.billing import TokenUsage
from searchr1_async.config import LearningSettings, LossName, WeightsInFlight
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.errors import CheckpointError, ConfigurationError
from searchr1_async.events import BesideSampled, Emit, MinibatchLearned, MinibatchSubmitted, Notice
from searchr1_async.service.connection import TrainingCalls, until_done, when_done
from searchr1_async.training.batches import advantages, learning_rate_at, token_weight
from searchr1_async.training.examples import (
    LearnedMinibatch,
    base_logprobs,
    kl_penalties,
    learning_metrics,
    optimizer_metrics,
    sampled_logprobs,
    to_datum,
    to_supervised_datum,
)

_RESUME_POINT_TTL = 7 * 24 * 3600
"""Seconds that the service keeps a rolling resume point. A week: a run stopped on Friday resumes on Monday."""
FALLBACK_LOSS: LossName = "ppo"
"""For episodes that ``stable_reinforce`` cannot train on."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """Result of training on one batch."""

    metrics: dict[str, float]
    state_path: str
    """``tinker://`` path of the weights and optimizer state after the step."""
    sampler_path: str | None
    """``tinker://`` path of weights saved for sampling, if a checkpoint or evaluation was due."""


class _Example(NamedTuple):
    datum: tinker_types.Datum
    episode: Episode
    kl_base: float
    """Sum over sampled tokens of log p_sampled - log p_base; 0 without a penalty."""


ForwardBackward = tinker.APIFuture[tinker_types.ForwardBackwardOutput]


@dataclass(slots=True)
class _Batch:
    """Everything submitted for the current batch."""

    minibatches: list[tuple[ForwardBackward, Callable[[tinker_types.ForwardBackwardOutput], LearnedMinibatch]]] = field(
        default_factory=list
    )
    """Each request, and what its answer makes of it."""
    steps: list[tinker.APIFuture[tinker_types.OptimStepResponse]] = field(default_factory=list)
    unstepped: bool = False
    """Whether a minibatch was submitted since the last optimizer step."""
    learning_rate: float = 0.0


class StepInProgress:
    """A fully submitted batch: its new weights arrive first, its resume point and metrics later."""

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
        """Waits until the new weights can be sampled; None if the weights did not change.

        Raises:
            ServiceError: a training call failed.
        """
        if self._sampler is None:
            return None
        with self._calls.waiting("an optimizer step"):
            client = await self._sampler
            # Weights that miss part of their batch must not be sampled. All of it is already done here.
            for future, _ in self._batch.minibatches:
                await future
            for step in self._batch.steps:
                await step
        return client

    async def finished(self) -> FinishedStep:
        """Waits until the step is done and the service has saved its resume point.

        Raises:
            ServiceError: a training call failed.
            CheckpointError: the checkpoint could not be saved.
        """
        batch = self._batch
        with self._calls.waiting("an optimizer step"):
            learned = [answered(await future) for future, answered in batch.minibatches]
            steps = [await step for step in batch.steps]
        with self._calls.waiting("saving a checkpoint", CheckpointError):
            state_path = (await self._state).path
            sampler_path = (await self._kept).path if self._kept is not None else None
        metrics = optimizer_metrics([step.metrics or {} for step in steps])
        metrics |= await anyio.to_thread.run_sync(learning_metrics, learned)
        metrics["optim/lr"] = batch.learning_rate
        metrics["optim/steps"] = float(len(steps))
        batch.minibatches.clear()  # frees thousands of episodes
        return FinishedStep(metrics, state_path, sampler_path)


class Learner:
    """Submits batches to one training client. Call it from one task.

    ``stable_reinforce`` accepts only episodes whose turns were all recorded by the service in this session. The rest of a batch
    (finished before a resume, or older than the service's memory) trains with ``ppo`` in a separate request before the same
    optimizer step: both losses are sums over tokens, so the gradients add up.

    Args:
        loss: overrides the loss in the settings; defaults to ``importance_sampling`` if neither is set.
        weights_in_flight: kind of sampling client that :meth:`publish` creates; see
            :attr:`~searchr1_async.config.PipelineSettings.weights_in_flight`.
        base: sampling client of the base model, for the KL penalty (``kl_coefficient``).

    Raises:
        ConfigurationError: ``kl_coefficient`` is set without ``base``.
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
        self.when_learned: Callable[[], None] = lambda: None
        """Called when the trainer finishes a minibatch."""
        self.usage = TokenUsage()
        """Tokens used so far: trained tokens, and prompt tokens read by the base model for the penalty."""
        self._batch = _Batch()
        self._outstanding: list[tinker.APIFuture[Any]] = []

    async def submit(self, groups: Sequence[Group], step: int) -> None:
        """Submits one minibatch of trainable groups and returns once the SDK has it.

        With a penalty, waits for the base model's log-probabilities first.

        Raises:
            ServiceError: the base model's log-probabilities could not be computed.
        """
        settings = self._settings
        make = partial(_assemble, settings=settings, loss=self.loss)
        base: list[list[NDArray[np.float64]] | None] = [None] * len(groups)
        if self._base is not None:
            base = list(await self._base_logprobs(groups))
        examples: list[_Example] = []
        for group, logprobs in zip(groups, base, strict=True):
            # Off the event loop, one group at a time: a whole batch in one piece would block for seconds.
            examples += await anyio.to_thread.run_sync(make, group, logprobs)
        if not examples:
            return
        self._count_examples([one.datum for one in examples])
        for loss, those in self._by_loss(examples):
            # In a thread, since the call serializes. Only this task makes calls, so their order is kept.
            config = (dict(settings.loss_config) or None) if loss == self.loss else None
            datums = [one.datum for one in those]
            future = await anyio.to_thread.run_sync(self._client.forward_backward, datums, loss, config)
            self._watch(future)
            answered = partial(
                LearnedMinibatch,
                episodes=[one.episode for one in those],
                tokens=_tokens(those),
                kl_base=None if self._base is None else sum(one.kl_base for one in those),
                is_fallback=loss != self.loss if self.loss == "stable_reinforce" else None,
            )
            self._batch.minibatches.append((future, answered))
        self._batch.unstepped = True
        count, tokens = len(examples), _tokens(examples)
        self._emit(MinibatchSubmitted(step, len(groups), count, tokens))
        # The service processes requests in order: when the last is done, all are.
        last, _ = self._batch.minibatches[-1]
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
        """No submitted call is pending."""
        self._outstanding = [future for future in self._outstanding if not future.future().done()]
        return not self._outstanding

    async def wait_idle(self) -> None:
        """Waits until :attr:`is_idle`. Cancelling it leaves pending calls alone; their errors surface where they are awaited.

        Raises:
            ServiceError: the service did not answer before the deadline.
        """
        with self._calls.waiting("a training call"):
            while not self.is_idle:
                await until_done(self._outstanding[-1])

    def end_part(self, step: int, total: int) -> None:
        """Runs an optimizer step over everything submitted since the last one, if anything was.

        Args:
            step: batch number from 1, which with ``total`` determines the learning rate.
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
        """Ends the batch: submits the optimizer step, the new sampling weights and the resume point, in this order.

        The next batch may be submitted right after. If nothing was submitted (every group was dropped), there is no optimizer
        step: the weights stay the same and a notice says so.

        Args:
            step: batch number from 1 of ``total``; 0 saves the initial weights.
            name: checkpoint name.
            keep: keep the checkpoint permanently, with sampling weights under this name.
            is_measured: save sampling weights for an evaluation, since the unsaved ones may be evicted before it starts (the
                embedded service keeps the last 16). The state does not expire either: these weights may be the best.
        """
        self.end_part(step, total)
        batch, self._batch = self._batch, _Batch()
        if not batch.steps and step > 0:
            self._emit(Notice(f"step {step}: no group to learn from, so the weights do not change", is_warning=True))
        sampler = self.publish() if batch.steps else None
        is_kept = keep or is_measured
        state = self._client.save_state(name, ttl_seconds=None if is_kept else _RESUME_POINT_TTL, overwrite=True)
        kept = self._client.save_weights_for_sampler(name) if is_kept else None
        for future in (sampler, state, kept):
            if future is not None:
                self._watch(future)
        return StepInProgress(batch, sampler, state, kept, self._calls)

    def publish(self) -> tinker.APIFuture[tinker.SamplingClient]:
        """Requests a client that samples from the current weights, for training rollouts."""
        return self._client.save_weights_and_get_sampling_client(
            record_stability_info=self.loss == "stable_reinforce", kind=self._kind
        )

    async def published(self) -> tinker.SamplingClient:
        """Awaits the client of :meth:`publish`.

        Raises:
            ServiceError: the weights could not be published.
        """
        with self._calls.waiting("publishing the weights"):
            return await self.publish()

    async def keep_weights(self, name: str) -> tuple[str, str]:
        """Saves the current weights permanently; returns the ``tinker://`` paths of the training state and sampling weights.

        Raises:
            CheckpointError: the save failed.
        """
        with self._calls.waiting("saving a checkpoint", CheckpointError):
            state = self._client.save_state(name, overwrite=True)
            sampler = self._client.save_weights_for_sampler(name)
            return (await state).path, (await sampler).path

    async def save_state(self, name: str) -> str:
        """Saves the current weights and optimizer state for a resume; returns the ``tinker://`` path.

        Raises:
            CheckpointError: the save failed.
        """
        with self._calls.waiting("saving a checkpoint", CheckpointError):
            return (await self._client.save_state(name, ttl_seconds=_RESUME_POINT_TTL, overwrite=True)).path

    async def supervised_step(self, episodes: Sequence[Episode], learning_rate: float) -> float:
        """One cross-entropy step on demonstrations; returns the mean loss per token.

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
        """Pauses or resumes the deadlines of training calls; the calls themselves continue."""
        self._calls.pause(is_paused)

    def _count(self, usage: TokenUsage) -> None:
        self.usage += usage

    def _count_examples(self, datums: Sequence[tinker_types.Datum]) -> int:
        """Counts the tokens of examples about to be trained on. Billing covers an example's input, which lacks its last token."""
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
        # Drops finished futures: each keeps its answer in memory.
        self._outstanding = [one for one in self._outstanding if not one.future().done()] + [future]

    async def _base_logprobs(self, groups: Sequence[Group]) -> list[list[NDArray[np.float64]]]:
        """Log-probabilities of the sampled tokens ([A]), per group and member."""
        assert self._base is not None
        episodes = [episode for group in groups for episode in group.episodes]
        before = self.usage
        found = iter(await base_logprobs(self._base, episodes, self._calls, count=self._count))
        read = self.usage - before  # no other task uses the base client
        self._emit(BesideSampled(read.prompt, read.cached, read.sampled))
        return [[next(found) for _ in group.episodes] for group in groups]


def _assemble(
    group: Group,
    base: Sequence[NDArray[np.float64]] | None,
    *,
    settings: LearningSettings,
    loss: LossName,
) -> list[_Example]:
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
        if episode.turns:  # no turns if the prompt did not fit
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
    """All tokens, prompts included."""
    return sum(one.datum.model_input.length + 1 for one in examples)
