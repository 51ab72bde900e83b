"""Tinker's losses: sums over tokens, never means, each a function of one token's log-probability.

Formulas and defaults are those of Tinker's documentation ("Loss functions"). ``lp`` is the log-probability of the
target under the weights being trained, ``q`` the one it was sampled with, ``A`` the advantage, ``r = exp(lp - q)``:

======================  ===============================================
``cross_entropy``       ``-w · lp``
``importance_sampling`` ``-r · A``
``ppo``                 ``-min(r · A, clip(r, 0.8, 1.2) · A)``
``cispo``               ``-stop_gradient(clip(r, 0, 4)) · A · lp``
``dro``                 ``-(lp · A - β/2 · (lp - q)²)``, β = 0.05
======================  ===============================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from searchr1_async.local.backend import Datum, UserFault

TokenInputs = Mapping[str, Tensor]
Thresholds = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss that is a sum of one term a token."""

    inputs: tuple[str, ...]
    """Per-token fields besides ``target_tokens``."""
    config: Mapping[str, float]
    """Names that ``loss_fn_config`` may hold, with their defaults."""
    terms: Callable[[Tensor, TokenInputs, Thresholds], Tensor]
    """The terms [tokens] at log-probabilities [tokens]."""
    weight: str | None
    """The field where a zero means that the token has no gradient; None: every token may have one."""


def _cross_entropy(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    return -inputs["weights"] * lp


def _importance_sampling(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    return -torch.exp(lp - inputs["logprobs"]) * inputs["advantages"]


def _ppo(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    ratio = torch.exp(lp - inputs["logprobs"])
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"])


def _cispo(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    ratio = torch.exp(lp.detach() - inputs["logprobs"])
    return -ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * inputs["advantages"] * lp


def _dro(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    return -(lp * inputs["advantages"] - 0.5 * config["beta"] * (lp - inputs["logprobs"]).square())


_RL = ("logprobs", "advantages")
LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(("weights",), {}, _cross_entropy, "weights"),
    "importance_sampling": Loss(_RL, {}, _importance_sampling, "advantages"),
    "ppo": Loss(_RL, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, _ppo, "advantages"),
    "cispo": Loss(_RL, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, _cispo, "advantages"),
    "dro": Loss(_RL, {"beta": 0.05}, _dro, None),
}


def find_loss(name: str, config: Mapping[str, float]) -> tuple[Loss, Thresholds]:
    """The loss and its configuration with defaults filled in.

    Raises:
        UserFault: an unknown loss, or an unknown or non-finite entry of its configuration.
    """
    loss = LOSSES.get(name)
    if loss is None:
        raise UserFault(f"Unknown loss_fn {name!r}; known are {', '.join(LOSSES)}.")
    for key, value in config.items():
        if key not in loss.config:
            known = ", ".join(loss.config) or "nothing"
            raise UserFault(f"loss_fn_config of {name!r} has {key!r}; it may hold {known}.")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserFault(f"loss_fn_config[{key!r}] is {value!r}, which is no finite number.")
    thresholds = {**loss.config, **config}
    if thresholds.get("clip_low_threshold", 0.0) > thresholds.get("clip_high_threshold", math.inf):
        raise UserFault(f"loss_fn_config of {name!r}: clip_low_threshold is above clip_high_threshold.")
    return loss, thresholds


def check_data(data: Sequence[Datum], name: str, loss: Loss, vocabulary: int, context: int) -> None:
    """Refuse data that the loss cannot use.

    Raises:
        UserFault: naming the datum and the field.
    """
    if not data:
        raise UserFault("forward_backward got no data.")
    wanted = ("target_tokens", *loss.inputs)
    for index, datum in enumerate(data):
        where = f"datum {index} of {len(data)}"
        tokens = datum.tokens
        if tokens.ndim != 1 or not 1 <= len(tokens) <= context:
            raise UserFault(f"{where}: model_input has shape {list(tokens.shape)}; wanted 1 to {context} tokens.")
        for field in wanted:
            if field not in datum.loss_inputs:
                raise UserFault(f"{where}: loss_fn {name!r} needs loss_fn_inputs[{field!r}]; it has {_names(datum)}.")
            values = np.asarray(datum.loss_inputs[field])
            if values.shape != tokens.shape:
                raise UserFault(
                    f"{where}: loss_fn_inputs[{field!r}] has shape {list(values.shape)}, but model_input has "
                    f"{len(tokens)} tokens."
                )
            if field != "target_tokens" and not np.isfinite(values).all():
                raise UserFault(f"{where}: loss_fn_inputs[{field!r}] is not finite everywhere.")
        if extra := sorted(set(datum.loss_inputs) - set(wanted)):
            raise UserFault(f"{where}: loss_fn {name!r} takes {', '.join(wanted)}, not {', '.join(extra)}.")
        for field, ids in (("model_input", tokens), ("target_tokens", np.asarray(datum.loss_inputs["target_tokens"]))):
            if ids.min() < 0 or ids.max() >= vocabulary:
                raise UserFault(f"{where}: {field} holds a token outside 0 to {vocabulary - 1}.")


def _names(datum: Datum) -> str:
    return ", ".join(sorted(datum.loss_inputs)) or "nothing"
