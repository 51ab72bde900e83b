"""Converts episodes to training examples, one ``tinker.Datum`` each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.episodes.types import Episode, Group

Span = tinker_types.PromptProvenanceSpan | tinker_types.SampledProvenanceSpan


def sampled_places(episode: Episode) -> Iterator[slice]:
    """Positions of each turn's sampled tokens among the targets, which are shifted by one."""
    position = len(episode.prompt_tokens) - 1
    for turn in episode.turns:
        yield slice(position, position + len(turn.sampled_tokens))
        position += len(turn.sampled_tokens) + len(turn.appended_tokens)


def sampled_logprobs(episode: Episode) -> NDArray[np.float64]:
    """Log-probabilities reported by the sampler for all sampled tokens, in order; shape [A]."""
    return np.concatenate([np.empty(0), *(np.asarray(turn.logprobs, dtype=np.float64) for turn in episode.turns)])


def at_sampled(episode: Episode, values_T: NDArray[np.floating]) -> NDArray[np.float64]:
    """Selects the sampled tokens' values, in order; shape [A]."""
    wide_T = values_T.astype(np.float64)
    return np.concatenate([np.empty(0), *(wide_T[place] for place in sampled_places(episode))])


def _shifted(episode: Episode) -> tuple[tinker_types.ModelInput, NDArray[np.int64]]:
    """Inputs (all tokens but the last) and targets (all but the first)."""
    pieces = [episode.prompt_tokens]
    for turn in episode.turns[:-1]:
        pieces += [turn.sampled_tokens, turn.appended_tokens]
    pieces.append(episode.turns[-1].sampled_tokens)
    # Not Episode.tokens, which would be cached for the episode's lifetime.
    tokens = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])
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
    mask_T = np.zeros(len(targets_T), dtype=np.float32)
    for place in sampled_places(episode):
        mask_T[place] = 1.0
    sampled_T = mask_T > 0
    logprobs_T, advantages_T = np.zeros_like(mask_T), np.zeros_like(mask_T)
    logprobs_T[sampled_T] = sampled_logprobs(episode)
    advantages_T[sampled_T] = advantage
    tensors = {"target_tokens": targets_T, "logprobs": logprobs_T, "advantages": advantages_T}
    if with_ratio_mask:
        tensors["sequence_ratio_mask"] = mask_T
    datum = _datum(inputs, tensors)
    spans = provenance(episode) if with_provenance else None
    return datum if spans is None else datum.with_provenance(model_input=spans[0], loss_fn_inputs=spans[1])


def to_supervised_datum(episode: Episode) -> tinker_types.Datum:
    """Example for cross_entropy: weight 1 at tokens that the model should write, 0 elsewhere."""
    inputs, targets_T = _shifted(episode)
    weights_T = np.zeros(len(targets_T), dtype=np.float32)
    for place in sampled_places(episode):
        weights_T[place] = 1.0
    return _datum(inputs, {"target_tokens": targets_T, "weights": weights_T})


def _datum(inputs: tinker_types.ModelInput, tensors: dict[str, NDArray[np.generic]]) -> tinker_types.Datum:
    return tinker_types.Datum(
        model_input=inputs,
        loss_fn_inputs={name: tinker_types.TensorData.from_numpy(values) for name, values in tensors.items()},
    )
