from __future__ import annotations

import threading
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.episodes.rewards import (
    RecipeReward,
    Score,
    answer_after_prefix,
    as_reward,
    exact_match,
    f1,
    normalize_answer,
    score,
    strict_recipe_answer,
)
from searchr1_async.episodes.types import Episode, Question, SearchCall, StopReason, Turn
from searchr1_async.errors import ConfigurationError, RewardError

pytestmark = pytest.mark.anyio


def episode(answer: str | None, *, content: str = "", golden: tuple[str, ...] = ("Paris",), **turn: object) -> Episode:
    last = Turn((1,), (-0.1,), content, content=content, **turn)  # type: ignore[arg-type]
    reason = StopReason.ANSWER if answer else StopReason.NO_ANSWER
    return Episode(Question("q", "Where?", golden), (0,), (last,), reason, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a pear", "apple pear"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("...", ""),
    ],
)
def test_normalises_as_squad_does(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_match_takes_any_golden_answer_and_never_an_empty_one() -> None:
    assert exact_match("the paris", ("London", "Paris")) == 1.0
    assert exact_match("Paris, France", ("Paris",)) == 0.0
    assert exact_match("the", ("a",)) == 0.0
    assert exact_match(None, ("Paris",)) == 0.0


def test_f1_is_the_overlap_of_words() -> None:
    assert f1("Mount Catherine", ("Mount Catherine 2,629 m",)) == pytest.approx(2 * 2 / (2 + 4))
    assert f1("Paris", ("London", "Paris")) == 1.0
    assert f1("Rome", ("Paris",)) == 0.0


@given(st.text(), st.lists(st.text(), min_size=1).map(tuple))
def test_scores_stay_in_bounds_and_agree(answer: str, golden: tuple[str, ...]) -> None:
    found = f1(answer, golden)
    assert 0.0 <= found <= 1.0
    if exact_match(answer, golden):
        assert found == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "lenient", "strict"),
    [
        ("Answer: Paris", "Paris", "Paris"),
        ("I think so.\nanswer: **Paris**", "Paris", None),
        ("The Answer: line decides. Answer: Paris", "Paris", None),
        ("Answer: Paris\nThat is all.", "Paris", "Paris\nThat is all."),
        ("Answer:", None, ""),
        ("Paris", None, None),
    ],
)
def test_reads_answers_leniently_and_as_the_recipe(text: str, lenient: str | None, strict: str | None) -> None:
    assert answer_after_prefix(text) == lenient
    assert strict_recipe_answer(text) == strict


async def test_the_recipe_reward_has_three_values() -> None:
    reward = RecipeReward()
    assert (await reward(episode("Paris"))).reward == pytest.approx(1.0)
    assert (await reward(episode("Rome"))).reward == pytest.approx(0.0)
    assert (await reward(episode(None))).reward == pytest.approx(-0.1)


async def test_strict_recipe_scores_what_the_recipe_would() -> None:
    strict = RecipeReward(strict_recipe=True)
    twice = episode("Paris", content="Answer: Rome? No. Answer: Paris")
    assert (await RecipeReward()(twice)).reward == pytest.approx(1.0)
    assert (await strict(twice)).reward == pytest.approx(-0.1)
    empty = episode(None, content="Answer:")
    assert (await RecipeReward()(empty)).parts["format"] == 0.0
    assert (await strict(empty)).parts["format"] == 1.0
    malformed = episode(None, content="Answer: Paris", call=SearchCall((), problem="no JSON"))
    assert (await strict(malformed)).reward == pytest.approx(-0.1)


async def test_a_users_number_gets_the_standard_parts_beside_it() -> None:
    async def length(episode: Episode) -> float:
        return 0.25

    scored = await score(episode("Paris"), length)
    assert scored.reward == 0.25
    assert scored.reward_parts == {"correct": 1.0, "format": 1.0, "f1": 1.0, "cover": 1.0}


async def test_cover_is_measured_beside_what_is_rewarded() -> None:
    given_back = await RecipeReward()(episode("It is Paris, I think"))
    assert (given_back.reward, given_back.parts["correct"], given_back.parts["cover"]) == (0.0, 0.0, 1.0)
    assert (await RecipeReward()(episode(None))).parts["cover"] == 0.0


async def test_a_users_own_parts_are_kept() -> None:
    async def parts(episode: Episode) -> Score:
        return Score(0.5, {"brevity": 0.7})

    assert (await score(episode("Paris"), parts)).reward_parts["brevity"] == 0.7


@pytest.mark.parametrize("given_back", [float("nan"), float("inf"), None, "1"])
async def test_refuses_rewards_that_are_no_finite_number(given_back: object) -> None:
    async def broken(episode: Episode) -> float:
        return given_back  # type: ignore[return-value]

    with pytest.raises(RewardError, match="finite number"):
        await score(episode("Paris"), broken)


async def test_a_failing_reward_names_the_question() -> None:
    async def broken(episode: Episode) -> float:
        raise KeyError("oops")

    with pytest.raises(RewardError, match=r"'q'.*KeyError"):
        await score(episode("Paris"), broken)


@pytest.mark.parametrize(
    ("given_back", "expected"),
    [(True, 1.0), (False, 0.0), (np.bool_(True), 1.0), (np.float32(0.5), 0.5), (np.array(2), 2.0), (3, 3.0)],
)
async def test_numbers_and_flags_of_any_library_are_rewards(given_back: Any, expected: float) -> None:
    scored = await score(episode("Paris"), lambda episode: Score(given_back, {"own": given_back}))
    assert (scored.reward, scored.reward_parts["own"]) == (expected, expected)
    assert type(scored.reward) is type(scored.reward_parts["own"]) is float


@pytest.mark.parametrize("part", [None, "1", float("nan"), float("inf"), [1.0], np.zeros(2)])
async def test_a_part_that_is_no_number_is_named(part: Any) -> None:
    with pytest.raises(RewardError, match=r"as its part 'brevity' for question 'q': return a finite number"):
        await score(episode("Paris"), lambda episode: Score(1.0, {"brevity": part}))
    with pytest.raises(RewardError, match="dict of finite numbers"):
        await score(episode("Paris"), lambda episode: Score(1.0, [part]))  # pyright: ignore[reportArgumentType]


async def test_plain_functions_run_beside_the_loop() -> None:
    """All block until all are called: on the loop, or sequentially, this would deadlock."""
    together = threading.Barrier(4, timeout=20)

    def blocking(episode: Episode, *, bonus: float = 0.0) -> float:
        together.wait()
        return 0.5 + bonus

    class Blocking:
        def __call__(self, episode: Episode) -> float:
            return blocking(episode)

    rewards: list[Any] = []

    async def add(reward: Any) -> None:
        rewards.append((await score(episode("Paris"), reward)).reward)

    async with anyio.create_task_group() as tasks:
        for reward in (blocking, Blocking(), partial(blocking, bonus=0.25), lambda episode: blocking(episode)):
            tasks.start_soon(add, reward)
    assert sorted(rewards) == [0.5, 0.5, 0.5, 0.75]


async def test_what_gives_a_coroutine_is_awaited() -> None:
    async def reward(episode: Episode, bonus: float = 0.0) -> float:
        return 0.25 + bonus

    class Reward:
        async def __call__(self, episode: Episode) -> float:
            return await reward(episode)

    for each, expected in ((Reward(), 0.25), (partial(reward, bonus=0.5), 0.75), (lambda one: reward(one), 0.25)):
        assert (await score(episode("Paris"), each)).reward == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "reward is None, which cannot be called"),
        ("exact_match", r"reward is 'exact_match' \(str\), which cannot be called"),
        (RecipeReward, r"give an instance, RecipeReward\(\)"),
        (lambda: 1.0, "with one argument, the episode"),
        (lambda episode, answer: 1.0, "with one argument, the episode"),
    ],
)
def test_what_is_no_reward_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        as_reward("reward", given)
    assert as_reward("reward", len) is len
