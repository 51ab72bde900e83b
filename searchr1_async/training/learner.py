"""The learner: minibatches in, optimizer steps and new sampling weights out.

A training client executes calls in submission order, so nothing is awaited in between: ``forward_backward`` is submitted
as soon as a minibatch's groups are complete, then the optimizer step, the new weights and the resume point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
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
from searchr1_async.errors import CheckpointError
from searchr1_async.events import BesideSampled, Emit, MinibatchLearned, MinibatchSubmitted, Notice
from searchr1_async.service.connection import TrainingCalls, until_done, when_done
from searchr1_async.training.batches import (
    LearnedMinibatch,
    advantages,
    kl_penalties,
    learning_metrics,
    optimizer_metrics,
    sampled_logprobs,
    to_datum,
    to_supervised_datum,
    token_weight,
)
from searchr1_async.training.losses import FALLBACK_LOSS, base_logprobs

_RESUME_POINT_TTL = 7 * 24 * 3600
"""Seconds that the service keeps a rolling resume point. A week: a run stopped on Friday resumes on Monday."""


class FinishedStep(NamedTuple):
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
    """Sum over sampled tokens of log p_sampled - log p_base."""


ForwardBackward = tinker.APIFuture[tinker_types.ForwardBackwardOutput]


@dataclass(slots=True, eq=False)
class SubmittedBatch:
    """Everything submitted for a batch: its new weights arrive first, its resume point and metrics later."""

    _calls: TrainingCalls
    minibatches: list[tuple[ForwardBackward, Callable[[tinker_types.ForwardBackwardOutput], LearnedMinibatch]]] = field(
        default_factory=list
    )
    """Each request, and what its answer makes of it."""
    steps: list[tinker.APIFuture[tinker_types.OptimStepResponse]] = field(default_factory=list)
    unstepped: bool = False
    """Whether a minibatch was submitted since the last optimizer step."""
    learning_rate: float = 0.0
    sampler: tinker.APIFuture[tinker.SamplingClient] | None = None
    """The new weights; None if they did not change. This and the following once the batch is whole."""
    state: tinker.APIFuture[tinker_types.SaveWeightsResponse] | None = None
    kept: tinker.APIFuture[tinker_types.SaveWeightsForSamplerResponse] | None = None

    async def published(self) -> tinker.SamplingClient | None:
        """Waits until the new weights can be sampled; None if the weights did not change."""
        if self.sampler is None:
            return None
        with self._calls.waiting("an optimizer step"):
            client = await self.sampler
            # Weights that miss part of their batch must not be sampled. All of it is already done here.
            for call in (*(future for future, _ in self.minibatches), *self.steps):
                await call
        return client

    async def finished(self) -> FinishedStep:
        """Waits until the step is done and the service has saved its resume point."""
        assert self.state is not None
        with self._calls.waiting("an optimizer step"):
            learned = [answered(await future) for future, answered in self.minibatches]
            steps = [(await step).metrics or {} for step in self.steps]
        with self._calls.waiting("saving a checkpoint", CheckpointError):
            state_path = (await self.state).path
            sampler_path = None if self.kept is None else (await self.kept).path
        metrics = optimizer_metrics(steps) | await anyio.to_thread.run_sync(learning_metrics, learned)
        metrics |= {"optim/lr": self.learning_rate, "optim/steps": float(len(steps))}
        self.minibatches.clear()  # frees thousands of episodes
        return FinishedStep(metrics, state_path, sampler_path)


def learning_rate_at(settings: LearningSettings, step: int, total: int) -> float:
    """Learning rate of batch ``step`` (from 1) of ``total``.

    Linear warm-up over ``schedule_warmup`` batches, the last at the peak rate; then constant, or linear or cosine decay that
    would reach 0 one batch after the last. Batches after ``total`` keep the last rate.
    """
    peak, warmup = settings.learning_rate, settings.schedule_warmup
    if step < warmup:
        return peak * step / warmup
    highest = max(1, warmup)
    done = (min(step, max(total, highest)) - highest) / (max(total, highest) - highest + 1)
    if settings.schedule == "linear":
        return peak * (1.0 - done)
    if settings.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak


class Learner:
    """Submits batches to one training client. Call it from one task.

    ``stable_reinforce`` accepts only episodes whose turns were all recorded by the service in this session. The rest of a batch
    (finished before a resume) trains with ``ppo`` in a separate request before the same optimizer step: both losses are sums over
    tokens, so the gradients add up.

    Args:
        loss: overrides the loss in the settings; defaults to ``importance_sampling`` if neither is set.
        weights_in_flight: kind of sampling client that :meth:`publish` creates; see
            :attr:`~searchr1_async.config.PipelineSettings.weights_in_flight`.
        base: sampling client of the base model, for the KL penalty (``kl_coefficient``).
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
        self._client, self._settings, self._emit, self._base = client, settings, emit, base
        self._kind: WeightsInFlight = weights_in_flight
        self._calls = TrainingCalls(settings.training_deadline)
        self.loss: LossName = loss or settings.loss or "importance_sampling"
        self.usage = TokenUsage()
        """Tokens used so far: trained tokens, and prompt tokens read by the base model for the penalty."""
        self._batch = SubmittedBatch(self._calls)
        self._outstanding: list[tinker.APIFuture[Any]] = []

    async def submit(self, groups: Sequence[Group], step: int) -> None:
        """Submits one minibatch of trainable groups, if there are any, and returns once the SDK has it.

        With a penalty, waits for the base model's log-probabilities first.
        """
        if not groups:
            return
        base = iter([] if self._base is None else await self._base_logprobs(self._base, groups))
        examples: list[_Example] = []
        for group in groups:
            logprobs = list(itertools.islice(base, len(group.episodes)))
            # Off the event loop, one group at a time: a whole batch in one piece would block for seconds.
            examples += await anyio.to_thread.run_sync(_examples_of, group, logprobs, self._settings, self.loss)
        if not examples:
            return
        tokens = self._count_examples([one.datum for one in examples])
        needs_record = self.loss == "stable_reinforce"
        known = [not needs_record or one.datum.loss_fn_input_spans is not None for one in examples]
        await self._send([one for one, is_known in zip(examples, known, strict=True) if is_known], self.loss)
        await self._send([one for one, is_known in zip(examples, known, strict=True) if not is_known], FALLBACK_LOSS)
        self._batch.unstepped = True
        self._emit(MinibatchSubmitted(step, len(groups), len(examples), tokens))
        # The service processes requests in order: when the last is done, all are.
        last, _ = self._batch.minibatches[-1]
        when_done(last, partial(self._emit, MinibatchLearned(step, len(examples), tokens)))

    async def _send(self, examples: Sequence[_Example], loss: LossName) -> None:
        if not examples:
            return
        answered = partial(
            LearnedMinibatch,
            episodes=[one.episode for one in examples],
            tokens=_tokens(one.datum for one in examples),
            kl_base=None if self._base is None else sum(one.kl_base for one in examples),
            is_fallback=loss != self.loss if self.loss == "stable_reinforce" else None,
        )
        config = (dict(self._settings.loss_config) or None) if loss == self.loss else None
        # In a thread, since the call serializes. Only this task makes calls, so their order is kept.
        datums = [one.datum for one in examples]
        future = await anyio.to_thread.run_sync(self._client.forward_backward, datums, loss, config)
        self._watch(future)
        self._batch.minibatches.append((future, answered))

    @property
    def is_idle(self) -> bool:
        """No submitted call is pending."""
        self._outstanding = [future for future in self._outstanding if not future.future().done()]
        return not self._outstanding

    async def wait_idle(self) -> None:
        """Waits until :attr:`is_idle`. Cancelling it leaves pending calls alone; their errors surface where they are awaited."""
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
    ) -> SubmittedBatch:
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
        batch, self._batch = self._batch, SubmittedBatch(self._calls)
        is_kept = keep or is_measured
        if batch.steps:
            batch.sampler = self.publish()
        elif step > 0:
            self._emit(Notice(f"step {step}: no group to learn from, so the weights do not change", is_warning=True))
        batch.state = self._client.save_state(name, ttl_seconds=None if is_kept else _RESUME_POINT_TTL, overwrite=True)
        batch.kept = self._client.save_weights_for_sampler(name) if is_kept else None
        for future in (batch.sampler, batch.state, batch.kept):
            if future is not None:
                self._watch(future)
        return batch

    def publish(self) -> tinker.APIFuture[tinker.SamplingClient]:
        """Requests a client that samples from the current weights, for training rollouts."""
        return self._client.save_weights_and_get_sampling_client(
            record_stability_info=self.loss == "stable_reinforce", kind=self._kind
        )

    async def published(self) -> tinker.SamplingClient:
        """Awaits the client of :meth:`publish`."""
        with self._calls.waiting("publishing the weights"):
            return await self.publish()

    async def save(self, name: str, *, keep: bool) -> FinishedStep:
        """Saves the current weights between batches; arguments as in :meth:`finish_step`."""
        return await (await self.finish_step(0, 0, name, keep=keep)).finished()

    async def supervised_step(self, episodes: Sequence[Episode], learning_rate: float) -> float:
        """One cross-entropy step on demonstrations; returns the mean loss per token."""
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
        tokens = _tokens(datums)
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

    async def _base_logprobs(self, base: tinker.SamplingClient, groups: Sequence[Group]) -> list[NDArray[np.float64]]:
        """Log-probabilities of each episode's sampled tokens [A]."""
        before = self.usage
        episodes = [episode for group in groups for episode in group.episodes]
        found = await base_logprobs(base, episodes, self._calls, count=self._count)
        read = self.usage - before  # no other task uses the base client
        self._emit(BesideSampled(read.prompt, read.cached, read.sampled))
        return found


def _examples_of(
    group: Group, base: Sequence[NDArray[np.float64]], settings: LearningSettings, loss: LossName
) -> list[_Example]:
    """Those of a group; ``base`` has the base model's log-probabilities [A] of its members, nothing without a penalty."""
    sampled = list(map(sampled_logprobs, group.episodes))
    differences = [ours_A - base_A for ours_A, base_A in zip(sampled, base or sampled, strict=True)]
    rows = zip(
        group.episodes,
        advantages(group.rewards, settings.advantage),
        kl_penalties(differences, settings.kl_coefficient),
        differences,
        strict=True,
    )
    examples: list[_Example] = []
    for episode, advantage, penalty_A, difference_A in rows:
        if episode.turns:  # no turns if the prompt did not fit
            weight = token_weight(episode.action_token_count, settings.normalization)
            datum = to_datum(
                episode,
                (advantage + penalty_A) * weight,
                with_ratio_mask=loss == "gspo",
                with_provenance=loss == "stable_reinforce",
            )
            examples.append(_Example(datum, episode, float(difference_A.sum())))
    return examples


def _tokens(datums: Iterable[tinker_types.Datum]) -> int:
    """All tokens, prompts included."""
    return sum(datum.model_input.length + 1 for datum in datums)
