"""Episodes as training examples: one episode, one ``tinker.Datum``."""

from __future__ import annotations

import numpy as np
from tinker import types as tinker_types

from searchr1_async.episodes.types import Episode


def _action_mask_T(episode: Episode) -> np.ndarray:  # noqa: N802
    """1.0 where the target token was sampled by the model; shape [T], T = len(tokens) - 1 (targets are shifted by one)."""
    mask = np.zeros(len(episode.tokens), dtype=np.float32)
    position = len(episode.prompt_tokens)
    for turn in episode.turns:
        mask[position : position + len(turn.sampled_tokens)] = 1.0
        position += len(turn.sampled_tokens) + len(turn.appended_tokens)
    return mask[1:]


def _shifted(episode: Episode) -> tuple[tinker_types.ModelInput, np.ndarray]:
    tokens = episode.tokens
    return tinker_types.ModelInput.from_ints(list(tokens[:-1])), np.asarray(tokens[1:], dtype=np.int64)


def to_datum(episode: Episode, advantage: float) -> tinker_types.Datum:
    """The example for the policy-gradient losses.

    Inputs are all tokens but the last, targets all but the first, shape [T]. ``logprobs`` holds what the sampler reported
    for each sampled token and 0 elsewhere, ``advantages`` the episode's advantage at sampled tokens and 0 elsewhere: so
    nothing that the model only read is learned.
    """
    inputs, targets_T = _shifted(episode)
    mask_T = _action_mask_T(episode)
    logprobs_T = np.zeros(len(targets_T), dtype=np.float32)
    logprobs_T[mask_T > 0] = np.concatenate([np.asarray(turn.logprobs, dtype=np.float32) for turn in episode.turns])
    return tinker_types.Datum(
        model_input=inputs,
        loss_fn_inputs={
            "target_tokens": tinker_types.TensorData.from_numpy(targets_T),
            "logprobs": tinker_types.TensorData.from_numpy(logprobs_T),
            "advantages": tinker_types.TensorData.from_numpy(mask_T * np.float32(advantage)),
        },
    )


def to_supervised_datum(episode: Episode) -> tinker_types.Datum:
    """The example for cross_entropy: weight 1 at the tokens that the model should write, 0 at those it reads."""
    inputs, targets_T = _shifted(episode)
    return tinker_types.Datum(
        model_input=inputs,
        loss_fn_inputs={
            "target_tokens": tinker_types.TensorData.from_numpy(targets_T),
            "weights": tinker_types.TensorData.from_numpy(_action_mask_T(episode)),
        },
    )
