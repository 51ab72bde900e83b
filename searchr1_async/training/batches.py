"""What the trainer gets of a batch: minibatches of groups, advantages, one ``tinker.Datum`` per episode; and metrics of its answers.

All of it is pure. Shapes: T targets (all tokens but the first), A sampled tokens of an episode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.config import AdvantageName, NormalizationName, RunLearning
from searchr1_async.episodes.types import Episode, Group

_MINIMUM = 0.25
"""Smallest fraction of a full minibatch sent to an idle trainer, since each request has a fixed cost."""
_SMALLEST_DEVIATION = 1e-6
"""Added to a group's standard deviation, so that constant rewards give advantages of 0."""
NOMINAL_TOKENS = 256
"""Sampled tokens at which both normalizations weigh an episode the same."""
_REDUCTIONS = {"sum": sum, "min": min, "max": max}


def example_tokens(group: Group) -> int:
    """Tokens of a group's examples; episodes without sampled tokens do not count."""
    return sum(
        len(episode.prompt_tokens) + sum(len(turn.sampled_tokens) + len(turn.appended_tokens) for turn in episode.turns)
        for episode in group.episodes
        if episode.turns
    )


class MinibatchGatherer:
    """Cuts a batch into minibatches of similar token counts as its trainable groups finish, one part (optimizer step) after another.

    A minibatch is sent when it has its share of the tokens that its part still expects, when the trainer is idle and it has a quarter
    of a share, and when its part ends.

    Args:
        mean_tokens: :attr:`mean_tokens` of the last batch's gatherer; None: the mean of the groups so far, which is too low, since
            short groups finish first.
    """

    def __init__(self, learning: RunLearning, mean_tokens: float | None = None) -> None:
        self._batch_groups = learning.groups_per_batch
        self._part_groups = learning.groups_per_batch / learning.optimizer_steps
        self._part_minibatches = max(1.0, learning.minibatches / learning.optimizer_steps)
        self._prior = mean_tokens
        self._waiting: list[Group] = []
        self._groups = self._tokens = self._sent = 0
        """Of the part: groups and tokens added, tokens sent."""
        self._shares = 0.0
        """Of the part: minibatches sent; one sent early counts as the part of a full one that it is."""
        self._all_tokens = 0

    @property
    def mean_tokens(self) -> float | None:
        """Mean tokens per group of this batch once it is over, dropped groups counted as 0; the prior if there were none."""
        return self._all_tokens / self._batch_groups if self._all_tokens else self._prior

    def add(self, group: Group) -> list[Group]:
        """Adds a finished group; returns the minibatch to send, empty if none is full."""
        tokens = example_tokens(group)
        self._waiting.append(group)
        self._groups += 1
        self._tokens += tokens
        self._all_tokens += tokens
        left = round(self._part_minibatches - self._shares)
        # Half a group short is as good as half a group over. The last share waits for the end of its part.
        half_group = self._tokens / self._groups / 2
        if left < 2 or self._tokens - self._sent <= (self._expected() - self._sent) / left - half_group:
            return []
        self._shares += 1
        return self._send()

    def trainer_is_idle(self) -> list[Group]:
        """Returns the minibatch to send to an idle trainer, empty if too little waits."""
        part = (self._tokens - self._sent) * self._part_minibatches / max(1.0, self._expected())
        if part < _MINIMUM:
            return []
        self._shares += part
        return self._send()

    def end_part(self) -> list[Group]:
        """Ends a part, once all its groups finished; returns its last minibatch, empty if nothing is left."""
        rest = self._send()
        self._groups = self._tokens = self._sent = 0
        self._shares = 0.0
        return rest

    def _send(self) -> list[Group]:
        waiting, self._waiting = self._waiting, []
        self._sent = self._tokens
        return waiting

    def _expected(self) -> float:
        if self._prior is None:
            return self._part_groups * self._tokens / max(1, self._groups)
        out = max(0.0, self._part_groups - self._groups)
        return max(self._part_groups * self._prior, self._tokens + out * self._prior)


Span = tinker_types.PromptProvenanceSpan | tinker_types.SampledProvenanceSpan


def sampled_mask(episode: Episode) -> NDArray[np.bool_]:
    """Which targets were sampled; shape [T]. The episode must have a turn."""
    lengths = [len(episode.prompt_tokens) - 1]
    for turn in episode.turns:
        lengths += [len(turn.sampled_tokens), len(turn.appended_tokens)]
    return np.repeat(np.arange(len(lengths) - 1) % 2 == 1, lengths[:-1])


def sampled_logprobs(episode: Episode) -> NDArray[np.float64]:
    """Log-probabilities reported by the sampler for all sampled tokens, in order; shape [A]."""
    return np.concatenate([np.empty(0), *(np.asarray(turn.logprobs, dtype=np.float64) for turn in episode.turns)])


def at_sampled(episode: Episode, values_T: NDArray[np.floating]) -> NDArray[np.float64]:
    """Selects the sampled tokens' values, in order; shape [A]."""
    mask_T = sampled_mask(episode)
    return values_T[: len(mask_T)][mask_T].astype(np.float64)


def scored_tokens(episode: Episode) -> NDArray[np.int32]:
    """The episode up to its last sampled token."""
    pieces = [episode.prompt_tokens]
    for turn in episode.turns[:-1]:
        pieces += [turn.sampled_tokens, turn.appended_tokens]
    pieces.append(episode.turns[-1].sampled_tokens)
    # Not Episode.tokens, which would be cached for the episode's lifetime.
    return np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])


def _shifted(episode: Episode) -> tuple[tinker_types.ModelInput, NDArray[np.int64]]:
    """Inputs (all tokens but the last) and targets (all but the first)."""
    tokens = scored_tokens(episode)
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
    sampled_T = sampled_mask(episode)
    logprobs_T, advantages_T = np.zeros((2, len(targets_T)), dtype=np.float32)
    logprobs_T[sampled_T] = sampled_logprobs(episode)
    advantages_T[sampled_T] = advantage
    tensors = {"target_tokens": targets_T, "logprobs": logprobs_T, "advantages": advantages_T}
    if with_ratio_mask:
        tensors["sequence_ratio_mask"] = sampled_T.astype(np.float32)
    datum = _datum(inputs, tensors)
    spans = provenance(episode) if with_provenance else None
    return datum if spans is None else datum.with_provenance(model_input=spans[0], loss_fn_inputs=spans[1])


def to_supervised_datum(episode: Episode) -> tinker_types.Datum:
    """Example for cross_entropy: weight 1 at tokens that the model should write, 0 elsewhere."""
    inputs, targets_T = _shifted(episode)
    return _datum(inputs, {"target_tokens": targets_T, "weights": sampled_mask(episode).astype(np.float32)})


def _datum(inputs: tinker_types.ModelInput, tensors: dict[str, NDArray[np.generic]]) -> tinker_types.Datum:
    return tinker_types.Datum(
        model_input=inputs,
        loss_fn_inputs={name: tinker_types.TensorData.from_numpy(values) for name, values in tensors.items()},
    )


def advantages(rewards: Sequence[float], kind: AdvantageName = "centred") -> list[float]:
    """One advantage per member, in order; they sum to 0. A single member gets 0. See :attr:`LearningSettings.advantage`.

    - ``centred``: not divided by the standard deviation, which would weight questions by how nearly constant their rewards are (Liu
      et al., 2025, "Understanding R1-Zero-Like Training").
    - ``scaled``: Shao et al. (2024, "DeepSeekMath", GRPO), with Bessel's correction.
    - ``leave_one_out``: Ahmadian et al. (2024, "Back to Basics", RLOO): the centred advantage times ``n / (n - 1)``.
    """
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(rewards) / count
    centred = [reward - mean for reward in rewards]
    if kind == "scaled":
        deviation = math.sqrt(math.fsum(value * value for value in centred) / (count - 1))
        return [value / (deviation + _SMALLEST_DEVIATION) for value in centred]
    if kind == "leave_one_out":
        return [value * count / (count - 1) for value in centred]
    return centred


def token_weight(sampled_tokens: int, normalization: NormalizationName) -> float:
    """Factor of an episode's advantage at each sampled token.

    Tinker's losses are sums over tokens. ``token``: 1, so an episode weighs as much as it has tokens. ``sequence``:
    ``256 / sampled_tokens``, GRPO's ``1 / |o|`` times a constant, so that episodes weigh the same. The constant keeps the gradient
    at the scale of ``token``, for which ``gradient_clip``, Adam's epsilon and the ``dro`` penalty are set. It is fixed rather than
    a batch mean, so that minibatches can be sent before the batch is complete.
    """
    return 1.0 if normalization == "token" else NOMINAL_TOKENS / max(1, sampled_tokens)


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
    """Training metrics over all sampled tokens of a batch, not a mean of minibatch means.

    ``METRICS`` (:mod:`searchr1_async.records.metrics`) describes each.

    The KL estimators are k1 and k2 of Schulman (2020, "Approximating KL Divergence"). Metrics of the service (``name:reduction``)
    become ``optim/name``, reduced as in the SDK, with means weighted by examples.
    """
    empty = np.empty(0)
    sampled_A = np.concatenate([empty, *(sampled_logprobs(one) for each in minibatches for one in each.episodes)])
    if not len(sampled_A):
        return {"optim/tokens": 0.0}
    trained = (
        at_sampled(episode, record["logprobs"].to_numpy())
        for each in minibatches
        for record, episode in zip(each.output.loss_fn_outputs, each.episodes, strict=True)
    )
    difference_A = sampled_A - np.concatenate([empty, *trained])
    sizes = [each.tokens for each in minibatches]
    metrics = _service_metrics(minibatches) | {
        "optim/loss": sum(float(each.output.metrics.get("loss:sum", 0.0)) for each in minibatches),
        "optim/tokens": float(len(sampled_A)),
        "optim/datums": float(sum(len(each.episodes) for each in minibatches)),
        "optim/minibatches": float(len(minibatches)),
        "optim/tokens_per_minibatch_min": float(min(sizes)),
        "optim/tokens_per_minibatch_max": float(max(sizes)),
        "optim/entropy": -float(sampled_A.mean()),
        "optim/kl_sample_train_v1": float(difference_A.mean()),
        "optim/kl_sample_train_v2": 0.5 * float(np.square(difference_A).mean()),
    }
    if any(each.is_fallback is not None for each in minibatches):
        metrics["optim/fallback_datums"] = float(sum(len(each.episodes) for each in minibatches if each.is_fallback))
    sums = [each.kl_base for each in minibatches if each.kl_base is not None]
    if len(sums) == len(minibatches):
        metrics["optim/kl_base"] = sum(sums) / len(sampled_A)
    return metrics


def _service_metrics(minibatches: Sequence[LearnedMinibatch]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for each in minibatches for key in each.output.metrics if key != "loss:sum"):
        name, _, reduction = key.partition(":")
        having = [each for each in minibatches if key in each.output.metrics]
        values = [float(each.output.metrics[key]) for each in having]
        if reduction == "mean":
            found[f"optim/{name}"] = float(np.average(values, weights=[len(each.episodes) for each in having]))
        elif reduction in _REDUCTIONS:
            found[f"optim/{name}"] = float(_REDUCTIONS[reduction](values))
    return found


def optimizer_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Service metrics of a batch's optimizer steps: the mean of gradient metrics, the last value of others."""
    found: dict[str, float] = {}
    for key in steps[-1] if steps else ():
        values = [float(step[key]) for step in steps if key in step]
        found[f"optim/{key}"] = sum(values) / len(values) if "grad" in key else values[-1]
    return found
