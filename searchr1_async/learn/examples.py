"""Episodes as training examples: one episode, one ``tinker.Datum``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tinker import types as tinker_types

from searchr1_async.episodes.types import Episode


def sampled_places(episode: Episode) -> Iterator[slice]:
    """Where each turn's sampled tokens are among the targets, which are shifted by one."""
    position = len(episode.prompt_tokens) - 1
    for turn in episode.turns:
        yield slice(position, position + len(turn.sampled_tokens))
        position += len(turn.sampled_tokens) + len(turn.appended_tokens)


def sampled_logprobs(episode: Episode) -> NDArray[np.float64]:
    """What the sampler reported for each sampled token, in order; shape [A]."""
    return np.concatenate([np.empty(0), *(np.asarray(turn.logprobs, dtype=np.float64) for turn in episode.turns)])


def at_sampled(episode: Episode, values_T: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of values for each target, those of the sampled tokens, in order; shape [A]."""
    wide_T = values_T.astype(np.float64)
    return np.concatenate([np.empty(0), *(wide_T[place] for place in sampled_places(episode))])


def _shifted(episode: Episode) -> tuple[tinker_types.ModelInput, NDArray[np.int64]]:
    """All tokens but the last, and all but the first."""
    pieces = [episode.prompt_tokens]
    for turn in episode.turns[:-1]:
        pieces += [turn.sampled_tokens, turn.appended_tokens]
    pieces.append(episode.turns[-1].sampled_tokens)
    # Not Episode.tokens, which would stay in memory as long as the episode does: 12 KB for 1,500 tokens.
    tokens = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])
    # An array in place of a list of numbers: checking 1,500 of them takes 50 of the 60 µs, and the SDK makes an array of
    # them anyway, on the thread that all requests share.
    chunk = tinker_types.EncodedTextChunk.model_construct(tokens=tokens[:-1])
    return tinker_types.ModelInput(chunks=[chunk]), tokens[1:].astype(np.int64)


def to_datum(
    episode: Episode, advantage: float | NDArray[np.floating], *, with_ratio_mask: bool = False
) -> tinker_types.Datum:
    """The example for the policy-gradient losses, of an episode that has a turn.

    Inputs are all tokens but the last, targets all but the first, shape [T]. ``logprobs`` holds what the sampler reported
    for each sampled token and 0 elsewhere, ``advantages`` the episode's advantage at sampled tokens and 0 elsewhere: so
    nothing that the model only read is learned.

    Args:
        advantage: of the episode, or of each of its sampled tokens [A].
        with_ratio_mask: adds ``sequence_ratio_mask``, 1 at sampled tokens, which the loss ``gspo`` needs.
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
    return _datum(inputs, tensors)


def to_supervised_datum(episode: Episode) -> tinker_types.Datum:
    """The example for cross_entropy: weight 1 at the tokens that the model should write, 0 at those it reads."""
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
