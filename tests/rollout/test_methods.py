"""Rollouts of baselines: searches, prompts and number of turns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.formats import make_dialect
from searchr1_async.episodes.rewards import RecipeReward
from searchr1_async.episodes.types import Episode, Group, Question, SearchCall, StopReason
from searchr1_async.errors import SearchError
from searchr1_async.records.metrics import answer_in_passage, group_metrics, passages_shown
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.player import LocalPlayer
from searchr1_async.testing import BrokenPolicy, BrokenSearch, DictSearch, ScriptedPolicy, make_tiny_tokenizer

pytestmark = pytest.mark.anyio

LIMITS = EpisodeLimits(max_turns=4, max_tokens=100, max_trajectory_tokens=2000)
QUESTION = Question("q", "Which mountain burns?", ("Etna",))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


def engine_for(
    tokenizer: Any, method: Any, search: DictSearch, *, first_turn: Any = "shared", **limits: Any
) -> RolloutEngine:
    dialect = make_dialect("tags", "m", tokenizer, method=method)
    player = LocalPlayer(dialect, search, replace(LIMITS, **limits), SampleGate(), first_turn, method)
    return RolloutEngine(dialect, player, SamplingSettings(seed=1), RecipeReward(), group_size=4)


async def played(engine: RolloutEngine, policy: Any, question: Question = QUESTION) -> Group:
    return await engine.play_group(engine.task(0, question, key="0"), policy, engine.failure_budget(1))


def answers(engine: RolloutEngine, text: str = "Etna") -> ScriptedPolicy:
    return ScriptedPolicy(lambda prompt: engine.dialect.write_answer(text))


@pytest.mark.parametrize("first_turn", ["shared", "split"])
async def test_the_question_is_searched_for_once_a_group_and_its_passages_are_in_every_prompt(
    tokenizer: Any, first_turn: Any
) -> None:
    search = DictSearch(lambda query: "Etna burns.")
    engine = engine_for(tokenizer, "rag", search, first_turn=first_turn)
    policy = answers(engine)
    group = await played(engine, policy)
    assert search.asked == [("Which mountain burns?",)]
    assert len(policy.prompts) == 4
    assert all("Etna burns." in engine.dialect.decode(prompt) for prompt in policy.prompts)
    for episode in group.episodes:
        assert episode.prompt_tokens == policy.prompts[0]
        assert episode.given is not None
        assert episode.given.queries == ("Which mountain burns?",)
        assert [passage.text for passage in passages_shown(episode)] == ["Etna burns."]
        assert answer_in_passage(episode)
        assert episode.calls == ()
        assert len(episode.turns) == 1
        assert episode.tokens == (*episode.prompt_tokens, *episode.turns[0].sampled_tokens)
    metrics = group_metrics([group])
    assert metrics["env/all/searches_per_episode"] == 1.0
    assert metrics["env/all/answer_in_passage"] == 1.0
    assert "env/all/valid_calls" not in metrics, "the model made no call"


@pytest.mark.parametrize("method", ["direct", "rag"])
async def test_a_model_that_would_search_has_one_turn_and_no_answer(tokenizer: Any, method: Any) -> None:
    search = DictSearch()
    engine = engine_for(tokenizer, method, search)
    asking = ScriptedPolicy(lambda prompt: engine.dialect.write_call(["Etna"]))
    group = await played(engine, asking)
    assert {(len(e.turns), e.stop_reason, e.answer, e.calls) for e in group.episodes} == {
        (1, StopReason.NO_ANSWER, None, ())
    }
    assert len(search.asked) == (1 if method == "rag" else 0)


async def test_nothing_is_given_to_a_direct_answer(tokenizer: Any) -> None:
    engine = engine_for(tokenizer, "direct", BrokenSearch())
    group = await played(engine, answers(engine))
    assert [(episode.given, episode.reward) for episode in group.episodes] == [(None, 1.0)] * 4


async def test_a_search_that_failed_fails_the_group_and_a_fatal_one_ends_the_playing(tokenizer: Any) -> None:
    engine = engine_for(tokenizer, "rag", BrokenSearch())
    group = await played(engine, answers(engine))
    assert group.episodes == ()
    assert [(e.stop_reason, e.error, e.turns) for e in group.failed] == [
        (StopReason.FAILED, "SearchError: the store is gone", ())
    ] * 4
    engine = engine_for(tokenizer, "rag", BrokenSearch(is_fatal=True))
    with pytest.raises(SearchError, match="the store is gone"):
        await played(engine, answers(engine))


async def test_what_was_given_is_kept_though_no_turn_came_and_counts_as_not_shown(tokenizer: Any) -> None:
    engine = engine_for(tokenizer, "rag", DictSearch(lambda query: "Etna burns."))
    group = await played(engine, BrokenPolicy())
    assert {len(episode.turns) for episode in group.failed} == {0}
    assert all(e.given is not None and e.given.results[0][0].text == "Etna burns." for e in group.failed)
    assert not any(answer_in_passage(episode) for episode in group.failed)


async def test_a_retrieval_over_the_time_limit_cuts_the_group(tokenizer: Any) -> None:
    class Hanging(DictSearch):
        async def search(self, queries: Any) -> Any:
            import anyio

            await anyio.sleep_forever()

    engine = engine_for(tokenizer, "rag", Hanging(), max_seconds=0.05)
    group = await played(engine, answers(engine))
    assert [(e.stop_reason, e.error, e.given) for e in group.failed] == [(StopReason.TIME_LIMIT, None, None)] * 4


async def test_a_question_that_cannot_be_searched_for_is_asked_without_passages(tokenizer: Any) -> None:
    search = DictSearch()
    engine = engine_for(tokenizer, "rag", search)
    group = await played(engine, answers(engine), replace(QUESTION, question="...?"))
    assert search.asked == []
    assert [episode.reward for episode in group.episodes] == [1.0] * 4
    given: set[SearchCall | None] = {episode.given for episode in group.episodes}
    (call,) = given
    assert call is not None
    assert call.queries == ()
    assert call.problem


async def test_passages_too_long_for_a_turn_end_the_episode_by_its_limit(tokenizer: Any) -> None:
    engine = engine_for(tokenizer, "rag", DictSearch(lambda query: "word " * 3000))
    group = await played(engine, answers(engine))
    reasons: list[tuple[StopReason, int]] = [(e.stop_reason, len(e.turns)) for e in group.episodes]
    assert reasons == [(StopReason.MAX_TRAJECTORY_TOKENS, 0)] * 4


def test_an_episode_has_nothing_given_by_default() -> None:
    assert Episode(QUESTION, (1,), (), StopReason.NO_ANSWER).given is None
