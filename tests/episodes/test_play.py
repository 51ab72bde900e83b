from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import play
from searchr1_async.episodes.types import Episode, Question, StopReason
from searchr1_async.testing import BrokenPolicy, BrokenSearch, DictSearch, ScriptedPolicy
from searchr1_async.training.batches import to_datum

pytestmark = pytest.mark.anyio

QUESTION = Question("q", "What is the capital of Egypt?", ("Cairo",))
LIMITS = EpisodeLimits(max_turns=3, max_tokens=200, max_trajectory_tokens=4000)
Dialects = dict[str, tuple[Dialect, Any]]


def turns_of(*turns: list[int]) -> ScriptedPolicy:
    left = list(turns)
    return ScriptedPolicy(lambda prompt: left.pop(0))


async def play_with(
    dialect: Dialect, policy: ScriptedPolicy, search: DictSearch | None = None, **kwargs: Any
) -> Episode:
    return await play(
        QUESTION,
        dialect=dialect,
        policy=policy,
        search=search or DictSearch(),
        limits=kwargs.pop("limits", LIMITS),
        **kwargs,
    )


def assert_token_exact(episode: Episode, prompts: list[tuple[int, ...]]) -> None:
    """Every prompt the policy saw equals the episode's tokens before that turn."""
    tokens = list(episode.prompt_tokens)
    for turn, prompt in zip(episode.turns, prompts, strict=True):
        assert tuple(tokens) == prompt
        tokens += [*turn.sampled_tokens, *turn.appended_tokens]
    assert tuple(tokens) == episode.tokens


@pytest.mark.parametrize("name", ["tags", "hermes", "qwen3", "qwen35"])
async def test_searches_then_answers(dialects: Dialects, name: str) -> None:
    dialect, _ = dialects[name]
    policy = turns_of(dialect.write_call(["capital of Egypt"]), dialect.write_answer("Cairo"))
    search = DictSearch()
    episode = await play_with(dialect, policy, search)
    assert episode.stop_reason is StopReason.ANSWER
    assert episode.answer == "Cairo"
    assert search.asked == [("capital of Egypt",)]
    assert [call.queries for call in episode.calls] == [("capital of Egypt",)]
    assert episode.turns[-1].appended_tokens == ()
    assert_token_exact(episode, policy.prompts)


async def test_the_last_allowed_turn_searches_nothing(dialects: Dialects) -> None:
    dialect, _ = dialects["tags"]
    search = DictSearch()
    episode = await play_with(dialect, ScriptedPolicy(lambda prompt: dialect.write_call(["again"])), search)
    assert episode.stop_reason is StopReason.MAX_TURNS
    assert len(episode.turns) == 3
    assert len(search.asked) == 2


async def test_a_malformed_call_ends_the_episode_or_is_told(dialects: Dialects) -> None:
    dialect, tokenizer = dialects["tags"]
    broken = tokenizer.encode("<search></search>", add_special_tokens=False)
    ended = await play_with(dialect, turns_of(broken))
    assert ended.stop_reason is StopReason.MALFORMED_CALL
    assert ended.calls[0].problem == "an empty query"
    tolerant = EpisodeLimits(max_turns=3, max_tokens=200, max_trajectory_tokens=4000, malformed_calls="tell")
    told = await play_with(dialect, turns_of(broken, dialect.write_answer("Cairo")), limits=tolerant)
    assert told.stop_reason is StopReason.ANSWER
    assert "an empty query" in tokenizer.decode(told.turns[0].appended_tokens)


async def test_a_turn_without_call_or_answer_ends(dialects: Dialects) -> None:
    dialect, tokenizer = dialects["tags"]
    episode = await play_with(dialect, turns_of(tokenizer.encode("Well, well.<|im_end|>", add_special_tokens=False)))
    assert episode.stop_reason is StopReason.NO_ANSWER
    assert episode.answer is None


async def test_a_cut_turn_ends_even_where_it_holds_an_answer(dialects: Dialects) -> None:
    dialect, tokenizer = dialects["hermes"]
    long = tokenizer.encode("Answer: Cairo " + "x " * 400, add_special_tokens=False)
    episode = await play_with(dialect, turns_of(long))
    assert episode.stop_reason is StopReason.MAX_TURN_TOKENS
    assert episode.answer is None
    assert episode.turns[0].truncated


async def test_no_turn_begins_that_might_not_fit(dialects: Dialects) -> None:
    dialect, _ = dialects["tags"]
    prompt = dialect.start(QUESTION)
    call = dialect.write_call(["x"])
    room = EpisodeLimits(max_turns=9, max_tokens=40, max_trajectory_tokens=len(prompt) + 60)
    policy = ScriptedPolicy(lambda prompt: call)
    episode = await play_with(dialect, policy, limits=room)
    assert episode.stop_reason is StopReason.MAX_TRAJECTORY_TOKENS
    assert all(len(prompt) + 40 <= room.max_trajectory_tokens for prompt in policy.prompts)
    none = EpisodeLimits(max_turns=9, max_tokens=40, max_trajectory_tokens=41)
    assert (await play_with(dialect, policy, limits=none)).turns == ()


async def test_a_broken_service_fails_the_episode_with_its_cause(dialects: Dialects) -> None:
    dialect, _ = dialects["tags"]
    lost = await play_with(dialect, BrokenPolicy())
    assert lost.failed
    assert lost.error == "ServiceError: the service is gone"
    policy = turns_of(dialect.write_call(["x"]))
    unanswered = await play_with(dialect, policy, BrokenSearch())
    assert unanswered.failed
    assert "the store is gone" in (unanswered.error or "")


async def test_too_many_queries_in_one_call_are_malformed(dialects: Dialects) -> None:
    dialect, _ = dialects["hermes"]
    roomy = EpisodeLimits(max_turns=3, max_tokens=2000)
    episode = await play_with(dialect, turns_of(dialect.write_call(["q"] * 200)), limits=roomy)
    assert episode.stop_reason is StopReason.MALFORMED_CALL
    assert "200 queries" in (episode.calls[0].problem or "")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["tags", "hermes", "qwen3", "qwen35"]),
    pieces=st.lists(
        st.lists(
            st.one_of(st.integers(0, 300), st.sampled_from(["call", "answer", "<|im_end|>", "<search>"])), max_size=5
        ),
        min_size=1,
        max_size=4,
    ),
)
async def test_every_episode_is_one_exact_example(dialects: Dialects, name: str, pieces: list[list[int | str]]) -> None:
    """Whatever the model writes, the episode ends, its prompts are exact, and its datum masks unsampled tokens."""
    dialect, tokenizer = dialects[name]

    def tokens(turn: list[int | str]) -> list[int]:
        out: list[int] = []
        for piece in turn:
            if piece == "call":
                out += dialect.write_call(["a"])
            elif piece == "answer":
                out += dialect.write_answer("b")
            elif isinstance(piece, str):
                out += tokenizer.encode(piece, add_special_tokens=False)
            else:
                out.append(piece)
        return out or [5]

    left = [tokens(turn) for turn in pieces]
    policy = ScriptedPolicy(lambda prompt: left.pop(0) if left else dialect.write_answer("c"))
    episode = await play_with(dialect, policy)
    assert not episode.failed
    assert_token_exact(episode, policy.prompts)
    datum = to_datum(episode, 0.5)
    assert datum.model_input.to_ints() == list(episode.tokens[:-1])
    advantages = datum.loss_fn_inputs["advantages"].to_numpy()
    assert (advantages != 0).sum() == episode.action_token_count
    learned = [token for token, a in zip(episode.tokens[1:], advantages, strict=True) if a]
    assert learned == [token for turn in episode.turns for token in turn.sampled_tokens]
