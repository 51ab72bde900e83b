from __future__ import annotations

import numpy as np
import pytest
import torch

from searchr1_async.local.sampler import ChoiceRule, choose

LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])


def frequencies(temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, draws: int = 20_000) -> np.ndarray:
    # A grid of draws instead of random ones makes frequencies exact to one draw.
    rules = [ChoiceRule(temperature, top_k, top_p, (i + 0.5) / draws) for i in range(draws if draws else 1)]
    tokens = choose(LOGITS.expand(len(rules), -1).contiguous(), rules).tokens
    return np.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, 0).numpy()
    np.testing.assert_allclose(frequencies(temperature), expected, atol=2e-4)


def test_top_k_keeps_the_k_likeliest_in_proportion() -> None:
    kept = torch.softmax(torch.where(LOGITS >= 1.0, LOGITS, -torch.inf), 0).numpy()
    np.testing.assert_allclose(frequencies(top_k=2, draws=2000), kept, atol=1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = torch.softmax(LOGITS, 0)
    p = float(probabilities[2] + probabilities[1]) - 1e-4
    kept = torch.softmax(torch.where(LOGITS >= 1.0, LOGITS, -torch.inf), 0).numpy()
    np.testing.assert_allclose(frequencies(top_p=p, draws=2000), kept, atol=1e-3)
    assert frequencies(top_p=1e-9, draws=100)[2] == 1.0


def test_log_probabilities_are_those_of_the_untempered_distribution() -> None:
    rules = [ChoiceRule(0.0, -1, 1.0, 0.3), ChoiceRule(0.3, -1, 1.0, 0.9), ChoiceRule(1.0, 1, 1.0, 0.9)]
    choices = choose(LOGITS.expand(3, -1).contiguous(), rules)

    assert choices.tokens.tolist() == [2, 2, 2]
    np.testing.assert_allclose(choices.logprobs, torch.log_softmax(LOGITS, 0)[2].expand(3).numpy(), rtol=1e-6)


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, -1).contiguous()
    rules = [ChoiceRule(1.0, -1, 1.0, uniform) for uniform in (0.0, 0.5, np.nextafter(1.0, 0.0))]
    assert choose(logits, rules).tokens.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "rule", [ChoiceRule(0.0, -1, 1.0, 0.5), ChoiceRule(1.0, -1, 1.0, 0.5), ChoiceRule(1.0, 3, 0.9, 0.5)]
)
def test_non_finite_logits_choose_nothing(rule: ChoiceRule) -> None:
    logits = torch.stack([LOGITS, torch.full((5,), torch.nan)])
    tokens = choose(logits, [rule, rule]).tokens
    assert tokens[0] >= 0
    assert tokens[1] == -1
