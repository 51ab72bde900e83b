"""Cost of tokens, against hand-computed values; never a guess."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.billing import Billing, TokenUsage, billing_of, is_tinker_host
from searchr1_async.models import Price

MILLION = 1_000_000


def in_the_cloud(model: str, **tokens: int) -> tuple[float | None, str, str]:
    cost = billing_of(model, is_embedded=False, is_tinker=True).cost(TokenUsage(**tokens))
    return cost.dollars, cost.text, cost.note


def test_each_kind_of_token_has_its_price() -> None:
    tokens = {"prompt": 3 * MILLION, "cached": 2 * MILLION, "sampled": MILLION, "trained": MILLION // 2}
    dollars, text, note = in_the_cloud("Qwen/Qwen3-8B", **tokens)
    assert dollars == pytest.approx(0.195 + 2 * 0.039 + 0.60 + 0.5 * 0.44)
    assert text == "$1.09"
    assert "2026-10-07" in note
    assert "$0.039 if cached" in note


def test_the_embedded_service_is_free_even_for_a_priced_model() -> None:
    used = TokenUsage(MILLION, 0, MILLION, MILLION)
    cost = billing_of("Qwen/Qwen3-8B", is_embedded=True, is_tinker=False).cost(used)
    assert (cost.dollars, cost.text, cost.tokens) == (0.0, "nothing: this machine", used)


@pytest.mark.parametrize("model", ["someone/else", "Qwen/Qwen3-8B:peft:131072", "qwen/qwen3-8b", ""])
def test_an_unknown_model_has_no_cost(model: str) -> None:
    """A longer context costs about twice the model's price, so using the model's would be a guess."""
    dollars, text, note = in_the_cloud(model, prompt=1)
    assert (dollars, text) == (None, "unknown")
    assert note.startswith(f"the price of {model} is unknown")


def test_a_known_suffix_has_its_own_price() -> None:
    assert in_the_cloud("Qwen/Qwen3.8-27B", prompt=MILLION)[0] == pytest.approx(1.86)
    assert in_the_cloud("Qwen/Qwen3.8-27B:peft:262144", prompt=MILLION)[0] == pytest.approx(2.48)


def test_without_a_training_price_only_sampling_has_a_cost() -> None:
    assert in_the_cloud("Qwen/Qwen3.8-27B:peft:262144", prompt=1, trained=1)[0] is None
    assert in_the_cloud("Qwen/Qwen3.8-27B:peft:262144", sampled=MILLION)[0] == pytest.approx(7.46)


def test_another_server_has_the_given_price() -> None:
    assert billing_of("Qwen/Qwen3-8B", is_embedded=False, is_tinker=False).dollars(TokenUsage(1)) is None
    own = billing_of("Qwen/Qwen3-8B", is_embedded=False, is_tinker=False, price=Price(1.0, 2.0, 3.0))
    assert own.dollars(TokenUsage(MILLION, 0, MILLION, MILLION)) == pytest.approx(6.0)
    assert "as of" not in own.note


@pytest.mark.parametrize(
    ("host", "is_tinker"),
    [
        (None, True),
        ("tinker.thinkingmachines.dev", True),
        ("thinkingmachines.ai", True),
        ("notthinkingmachines.ai", False),
        ("127.0.0.1", False),
    ],
)
def test_tinker_hosts_are_recognised(host: str | None, is_tinker: bool) -> None:
    assert is_tinker_host(host) is is_tinker


counts = st.integers(0, 10**12)


@st.composite
def usages(draw: st.DrawFn) -> TokenUsage:
    prompt = draw(counts)
    return TokenUsage(prompt, draw(st.integers(0, prompt)), draw(counts), draw(counts))


@given(usages(), usages())
def test_the_cost_of_a_sum_is_the_sum_of_the_costs(one: TokenUsage, other: TokenUsage) -> None:
    billing = Billing(Price(0.33, 1.005, 0.737))
    whole, first, second = billing.dollars(one + other), billing.dollars(one), billing.dollars(other)
    assert first is not None
    assert second is not None
    assert whole == pytest.approx(first + second)
    assert (one + other) - other == one
    assert 0 <= first <= (0.33 * one.prompt + 1.005 * one.sampled + 0.737 * one.trained) / 1e6 * (1 + 1e-12)
