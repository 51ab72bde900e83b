"""Tinker's losses, all sums over tokens (not means).

Formulas and defaults follow Tinker's documentation ("Loss functions"). ``lp`` is the target's log-probability under the
weights being trained, ``q`` its log-probability when sampled, ``A`` the advantage, ``r = exp(lp - q)``:

======================  ===============================================
``cross_entropy``       ``-w · lp``
``importance_sampling`` ``-r · A``
``ppo``                 ``-min(r · A, clip(r, 0.8, 1.2) · A)``
``cispo``               ``-stop_gradient(clip(r, 0, 4)) · A · lp``
``dro``                 ``-(lp · A - β/2 · (lp - q)²)``, β = 0.05
``gspo``                ``-min(s · A, clip(s, 1 - 3e-4, 1 + 4e-4) · A)``
``stable_reinforce``    ``-stop_gradient(w) · A · lp``
======================  ===============================================

gspo is GSPO-token of Zheng et al., 2025, "Group Sequence Policy Optimization": ``s`` has the value of the geometric mean
of ``r`` over the sequence's tokens marked by ``sequence_ratio_mask``, and the gradient of the token's own ``lp``. Tinker
documents no thresholds; the defaults are the paper's.

Tinker's ``stable_reinforce`` formula is not published, so this one is our choice: TOPR of Le Roux et al., 2025, "Tapered
Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs", with token-level weights ``w = clip(r, α, 1)``
for ``A > 0`` and ``w = min(r, 1)`` for ``A < 0``; ``q`` is recorded by the service. Weights in [0, 1] keep a stale token from
moving the model more than a fresh one. A bad token that has become unlikely gets almost no gradient: pushing it down
further is unbounded and breaks plain REINFORCE. A good token that has become unlikely keeps at least weight α (default
1, as in TOPR), since with sparse rewards it is the rare success to keep, and ``lp <= 0`` bounds the push up. α = 0 is
importance sampling truncated at 1. At ``r = 1`` the gradient equals ``importance_sampling``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from searchr1_async.local.backend import (
    LOSS_INPUTS,
    RATIO_MASK,
    STABLE_REINFORCE,
    LossInputs,
    Thresholds,
    check_data,
    find_inputs,
)

__all__ = ["LOSSES", "Loss", "Thresholds", "TokenInputs", "check_data", "find_loss", "with_sequence_ratio"]

TokenInputs = Mapping[str, Tensor]
_LOG_RATIO = "sequence_log_ratio"


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss that is a sum of one term per token."""

    inputs: LossInputs
    terms: Callable[[Tensor, TokenInputs, Thresholds], Tensor]
    """Terms [tokens] at log-probabilities [tokens]; a sequential loss needs :func:`with_sequence_ratio`'s inputs."""


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


def _gspo(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    ratio = torch.exp(inputs[_LOG_RATIO] + lp - lp.detach())
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"])


def _stable_reinforce(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    advantages = inputs["advantages"]
    ratio = torch.exp(lp.detach() - inputs["logprobs"])
    weight = ratio.clamp(max=1.0)
    weight = torch.where(advantages > 0, weight.clamp(min=config["alpha"]), weight)
    return -weight * advantages * lp


LOSSES: Mapping[str, Loss] = {
    name: Loss(LOSS_INPUTS[name], terms)
    for name, terms in (
        ("cross_entropy", _cross_entropy),
        ("importance_sampling", _importance_sampling),
        ("ppo", _ppo),
        ("cispo", _cispo),
        ("dro", _dro),
        ("gspo", _gspo),
        (STABLE_REINFORCE, _stable_reinforce),
    )
}


def find_loss(name: str, config: Mapping[str, float]) -> tuple[Loss, Thresholds]:
    """The loss and its configuration with defaults filled in. Raises as :func:`find_inputs`."""
    _, thresholds = find_inputs(name, config)
    return LOSSES[name], thresholds


def with_sequence_ratio(inputs: TokenInputs, logprobs: Tensor, lengths: list[int]) -> TokenInputs:
    """Adds each token's sequence log-ratio (without gradient) to the inputs of a sequential loss.

    ``logprobs`` [tokens] are concatenated sequences of ``lengths`` tokens.
    """
    counts = torch.tensor(lengths, device=logprobs.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=logprobs.device), counts)
    mask = (inputs[RATIO_MASK] != 0).double()
    # Double precision: the mean of thousands of differences is compared with thresholds 3e-4 away from 1.
    difference = mask * (logprobs.detach().double() - inputs["logprobs"].double())
    sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=logprobs.device)
    sums.index_add_(1, sequence, torch.stack([difference, mask]))
    return {**inputs, _LOG_RATIO: (sums[0] / sums[1])[sequence].to(logprobs.dtype)}
