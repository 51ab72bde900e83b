"""Cost estimates: against hand-computed sums, and against a real run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import searchr1_async as sr
from searchr1_async.billing import Billing, TokenUsage
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.training.estimate import RunShape
from tests import tiny_world

CLOUD = "https://tinker.thinkingmachines.dev"
QUESTIONS = [sr.Question(str(number), "Who wrote the book?!", ("x",), "nq") for number in range(10)]
PRICE = sr.runs.Price(1.0, 2.0, 3.0)


def estimated(**changes: Any) -> sr.runs.CostEstimate:
    settings: dict[str, Any] = {"service": CLOUD, "price": PRICE, "group_size": 4, "groups_per_batch": 5}
    return sr.estimate_cost(QUESTIONS, **tiny_world.given(sr.TrainConfig, settings | changes))


BY_HAND: dict[str, Any] = {"turns": 2, "tokens_per_turn": 50, "prompt_tokens": 100, "passage_tokens": 40}


def test_against_hand_computed_sums() -> None:
    found = estimated(**BY_HAND)
    between = 3 * 40 + 30
    prompt, length = 100 + (100 + 50 + between), 100 + 2 * 50 + between
    episodes = 10 * 4
    assert found.steps == 2
    assert found.tokens == TokenUsage(
        episodes * prompt, episodes * (100 + 100 * 3 // 4), episodes * 100, episodes * (length - 1)
    )
    assert found.dollars == pytest.approx(Billing(PRICE).dollars(found.tokens))
    assert found.dollars_per_step == pytest.approx((found.dollars or 0) / 2)
    assert "2 steps" in found.text
    assert found.assumptions[0].startswith("An episode has 2 turns of 50 sampled tokens each;")


@pytest.mark.parametrize(
    ("changes", "held_out", "episodes"),
    [
        ({}, 0, 5 * 4),
        ({"max_staleness": 2, "refill_groups": 1, "spare_groups": 2}, 0, (3 * 5 + 2) * 4),
        ({"max_staleness": 2, "steps": 2}, 0, 2 * 5 * 4),
        ({"held_out_samples": 3}, 10, 30),
        ({"held_out_samples": 3, "evaluate_every": 5}, 10, 5 * 4 + 30),
    ],
)
def test_episodes_in_flight_are_those_of_batches_that_overlap_or_of_a_measurement(
    changes: dict[str, Any], held_out: int, episodes: int
) -> None:
    sizes = {"steps": 100, "epochs": 1, "minibatches": 1, "group_size": 4, "groups_per_batch": 5}
    config = sr.TrainConfig(lora_rank=8, **sizes | changes)
    assert RunShape(config, QUESTIONS, QUESTIONS[:held_out], 3).episodes_in_flight == episodes


def test_includes_evaluations_warm_up_and_penalty() -> None:
    plain = estimated(**BY_HAND)
    warm_up = sr.WarmUp(steps=3, batch_size=2)
    held_out = {"held_out": QUESTIONS[:4], "held_out_samples": 1, "evaluate_every": 1}
    found = estimated(**BY_HAND, **held_out, warm_up=warm_up, kl_coefficient=0.1)
    episodes, length = 4 * 4, 350  # untrained, after the warm-up, after step 1, after reinforcement learning
    more = found.tokens - plain.tokens
    assert more.prompt == episodes * 400 + 40 * length
    assert more.cached == episodes * 100, "a question that is asked once shares no prompt"
    assert more.sampled == episodes * 100 + 40
    assert more.trained == 3 * 2 * (length - 1)
    assert (found.dollars_per_step or 0) > (plain.dollars_per_step or 0)


def test_fractions_can_be_given() -> None:
    found = estimated(**BY_HAND, cached=0.5, trained=0.25)
    assert found.tokens.cached == found.tokens.prompt / 2
    assert found.tokens.trained == 10 * 349
    assert "25% of the episodes are trained on, the others dropped." in found.assumptions


def test_an_unknown_price_leaves_the_tokens() -> None:
    found = sr.estimate_cost(QUESTIONS, service=CLOUD, config=sr.TrainConfig(model="nobody/knows", steps=3))
    assert found.dollars is None
    assert found.tokens.prompt > 0
    assert found.text.startswith("unknown, since the price of nobody/knows is unknown")


def test_the_embedded_service_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    found = sr.estimate_cost(QUESTIONS)
    assert found.dollars == 0
    assert found.text.startswith("nothing, on this machine")


def test_it_has_readable_text() -> None:
    found = estimated()
    assert str(found).splitlines()[0] == f"Estimated cost: {found.text}."
    assert all(f"  - {sentence}" in str(found) for sentence in found.assumptions)
    assert repr(found) == str(found)


@given(turns=st.floats(1, 20), tokens=st.floats(1, 5000), prompt=st.floats(1, 3000), results=st.integers(1, 10))
def test_more_turns_cost_more_up_to_the_limits(turns: float, tokens: float, prompt: float, results: int) -> None:
    assumed = {"tokens_per_turn": tokens, "prompt_tokens": prompt, "search_results": results}
    found = estimated(turns=turns, **assumed)
    assert 0 <= found.tokens.cached <= found.tokens.prompt
    more = estimated(turns=turns + 0.5, **assumed)
    if turns < 5:
        assert more.tokens.prompt > found.tokens.prompt
        assert more.tokens.trained > found.tokens.trained
    else:
        assert more == found
    assert found.tokens.sampled <= 40 * 5 * 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": 0}, "turns is 0"),
        ({"cached": 1.5}, "cached is 1.5"),
        ({"steps": 0}, "steps is 0"),
        ({"group_size": 0}, "group_size is 0"),
        ({"search_results": 0}, "search_results is 0"),
        ({"turns": 2, "like": "somewhere"}, "leave out the other arguments"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=message):
        estimated(**changes)


def test_a_folder_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sr.errors.RunFolderError, match="no finished step"):
        estimated(like=tmp_path)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sr.Run]:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)

    def make(**changes: Any) -> sr.Run:
        settings = {"out_dir": tmp_path / "run", "price": PRICE} | tiny_world.served_settings(**changes)
        return sr.train(
            tiny_world.make_questions()[0],
            tiny_world.make_search(tmp_path / "index"),
            **tiny_world.given(sr.TrainConfig, settings),
        )

    return make


@pytest.mark.anyio
async def test_like_a_past_run_it_matches_that_runs_usage(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    async def reward(episode: sr.Episode) -> float:
        return sum(episode.tokens) % 7 / 7

    cost = (await start(steps=2, reward=reward)).cost
    assert cost is not None
    found = sr.estimate_cost(
        tiny_world.make_questions()[0],
        service=CLOUD,
        like=tmp_path / "run",
        config=sr.TrainConfig(price=PRICE, group_size=4, groups_per_batch=6, steps=2),
    )
    assert found.tokens.prompt == pytest.approx(cost.tokens.prompt, abs=1)
    assert found.tokens.cached == pytest.approx(cost.tokens.cached, abs=1)
    assert found.tokens.sampled == pytest.approx(cost.tokens.sampled, abs=1)
    assert found.tokens.trained == pytest.approx(cost.tokens.trained, rel=1e-6, abs=1)
    assert found.dollars == pytest.approx(cost.dollars, rel=1e-3)


def test_the_model_is_that_of_the_run_to_start_from(tmp_path: Path) -> None:
    model = "Qwen/Qwen3.5-9B"
    (tmp_path / "first").mkdir()
    ResumePoint(1, 5, "tinker://run/weights/000001", "order", model).save(tmp_path / "first")
    started = estimated(**BY_HAND, price=None, start_from=tmp_path / "first")
    assert started.dollars == estimated(**BY_HAND, price=None, model=model).dollars
    assert started.dollars is not None
    assert started.dollars != estimated(**BY_HAND, price=None).dollars
    with pytest.raises(sr.errors.ConfigurationError, match=r"pass model='Qwen/Qwen3\.5-9B'"):
        estimated(start_from=tmp_path / "first", model="Qwen/Qwen3-8B")
    with pytest.raises(sr.errors.ConfigurationError, match="neither a run's folder nor a PEFT adapter's"):
        estimated(start_from=tmp_path / "no-run")
