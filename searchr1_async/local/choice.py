"""Next-token sampling from a batch of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """Sampling parameters of one row."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float
    """Drawn from [0, 1) by the sequence's own generator, so that its tokens do not depend on the batch."""


@dataclass(frozen=True, slots=True)
class Choices:
    tokens: NDArray[np.int64]
    """[rows]; -1 where the logits are not finite."""
    logprobs: NDArray[np.float32]
    """[rows], under the untempered, untruncated distribution, as the trainer computes them."""
    log_normalizer: Tensor
    """[rows], logsumexp of the logits."""


def choose(logits: Tensor, rules: Sequence[ChoiceRule]) -> Choices:
    """Choose one token per row of ``logits`` [rows, vocabulary] (float32).

    Applies temperature, top-k, top-p, then inverts the cumulative distribution at the row's uniform draw.
    """
    log_normalizer = torch.logsumexp(logits, dim=-1)
    tokens = torch.empty(len(rules), dtype=torch.int64, device=logits.device)
    greedy = [i for i, rule in enumerate(rules) if rule.temperature == 0.0]
    plain = [i for i, rule in enumerate(rules) if rule.temperature > 0.0 and rule.top_k < 1 and rule.top_p >= 1.0]
    if greedy:
        tokens[greedy] = _rows(logits, greedy).argmax(-1)
    if plain:
        tokens[plain] = _invert(_probabilities(logits, log_normalizer, plain, rules), plain, rules)
    for i in sorted(set(range(len(rules))) - set(greedy) - set(plain)):
        tokens[i] = _truncated(logits[i], rules[i])
    logprobs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - log_normalizer
    bad = ~torch.isfinite(log_normalizer)
    tokens.masked_fill_(bad, -1)
    return Choices(tokens.cpu().numpy(), logprobs.cpu().numpy(), log_normalizer)


def _rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[list(rows)]


def _probabilities(logits: Tensor, log_normalizer: Tensor, rows: Sequence[int], rules: Sequence[ChoiceRule]) -> Tensor:
    """Tempered, unnormalized probabilities."""
    chosen = _rows(logits, rows)
    if all(rules[i].temperature == 1.0 for i in rows):
        return (chosen - _rows(log_normalizer, rows).unsqueeze(1)).exp_()
    heat = torch.tensor([rules[i].temperature for i in rows], device=logits.device).unsqueeze(1)
    return (chosen - chosen.amax(-1, keepdim=True)).div_(heat).exp_()


def _invert(weights: Tensor, rows: Sequence[int], rules: Sequence[ChoiceRule]) -> Tensor:
    cumulative = weights.cumsum_(-1)
    uniform = torch.tensor([rules[i].uniform for i in rows], dtype=weights.dtype, device=weights.device)
    total = cumulative[:, -1]
    # Keep the goal below the total despite rounding; right=True then finds the first token whose cumulative weight
    # exceeds it, so a token of weight zero is never chosen.
    goal = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, goal.unsqueeze(1), right=True).squeeze(1)
    return index.clamp_(max=weights.shape[-1] - 1)  # only matters for non-finite rows


def _truncated(logits: Tensor, rule: ChoiceRule) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        return torch.zeros((), dtype=torch.int64, device=logits.device)
    vocabulary = len(logits)
    count = min(rule.top_k, vocabulary) if rule.top_k >= 1 else vocabulary
    values, ids = torch.topk(logits, count)
    weights = torch.softmax(values / rule.temperature, -1)
    # Keep a token while the preceding ones sum to less than top_p; always keep the first.
    weights = weights.masked_fill((weights.cumsum(-1) - weights) >= rule.top_p, 0.0)
    if rule.top_p <= 0.0:
        return ids[0]
    return ids[_invert(weights.unsqueeze(0), [0], [rule])[0]]
