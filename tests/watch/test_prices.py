"""What tokens cost: by hand, and never by a guess."""

from __future__ import annotations

import datetime as dt

import pytest

from searchr1_async.models import known_prices
from searchr1_async.watch.prices import cost_of


def test_tokens_by_their_prices() -> None:
    cost = cost_of("Qwen/Qwen3-8B", False, prompt_tokens=2_000_000, sampled_tokens=1_000_000, trained_tokens=500_000)
    assert cost is not None
    assert cost.dollars == pytest.approx(2 * 0.195 + 0.60 + 0.5 * 0.44)
    assert cost.text == "$1.21 at most"
    assert "2026-10-07" in cost.note
    assert "80%" in cost.note


def test_this_machine_costs_nothing_even_for_a_model_with_a_price() -> None:
    cost = cost_of("Qwen/Qwen3-8B", True, prompt_tokens=10**9, sampled_tokens=10**9, trained_tokens=10**9)
    assert cost is not None
    assert cost.dollars == 0.0
    assert cost.text == "nothing: this machine"


@pytest.mark.parametrize("model", ["someone/else", "Qwen/Qwen3-8B:peft:131072", "qwen/qwen3-8b", ""])
def test_an_unknown_model_has_no_cost(model: str) -> None:
    """A longer context has a price of its own, about twice the model's: taking the model's would be a guess."""
    assert cost_of(model, False, prompt_tokens=1, sampled_tokens=1, trained_tokens=1) is None


def test_a_known_suffix_has_its_own_price() -> None:
    short = cost_of("Qwen/Qwen3.8-27B", False, prompt_tokens=10**6, sampled_tokens=0, trained_tokens=0)
    long = cost_of("Qwen/Qwen3.8-27B:peft:262144", False, prompt_tokens=10**6, sampled_tokens=0, trained_tokens=0)
    assert short is not None
    assert long is not None
    assert (short.dollars, long.dollars) == (pytest.approx(1.86), pytest.approx(2.48))


def test_without_a_price_of_training_only_sampling_has_a_cost() -> None:
    model = "Qwen/Qwen3.8-27B:peft:262144"
    assert cost_of(model, False, prompt_tokens=1, sampled_tokens=1, trained_tokens=1) is None
    assert cost_of(model, False, prompt_tokens=1, sampled_tokens=1, trained_tokens=0) is not None


def test_an_old_price_is_no_upper_bound() -> None:
    cost = cost_of("Qwen/Qwen3-4B-Instruct-2507", False, prompt_tokens=10**6, sampled_tokens=0, trained_tokens=0)
    assert cost is not None
    assert cost.text == "about $0.07"
    assert "risen since" in cost.note


def test_the_table_is_dated_and_in_order() -> None:
    for price in known_prices().values():
        dt.date.fromisoformat(price.as_of)
        assert 0 < price.prefill < price.sample
        assert price.train is None or price.train > 0
