from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.formats import Dialect, TagsDialect
from searchr1_async.episodes.rendering import ChatMLRenderer
from searchr1_async.episodes.rewards import RecipeReward
from searchr1_async.episodes.types import Episode, Group, Question, StopReason
from searchr1_async.errors import RewardError, SearchError, TooManyFailuresError
from searchr1_async.rollout.engine import GroupToPlay, RolloutEngine
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.limit import LimitSettings, SampleLimit
from searchr1_async.rollout.player import GroupPolicy, LocalPlayer
from searchr1_async.testing import BrokenPolicy, BrokenSearch, DictSearch, ScriptedPolicy, make_tiny_tokenizer

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def dialect(tmp_path_factory: pytest.TempPathFactory) -> Dialect:
    tokenizer = make_tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))
    return TagsDialect(ChatMLRenderer(tokenizer), tokenizer)


def engine(dialect: Dialect, **changes: Any) -> RolloutEngine:
    search = changes.pop("search", None) or DictSearch()
    limits = changes.pop("limits", None) or EpisodeLimits(max_turns=3, max_tokens=100, max_trajectory_tokens=2000)
    parts: dict[str, Any] = {
        "dialect": dialect,
        "player": LocalPlayer(dialect, search, limits, SampleGate(), changes.pop("first_turn", "shared")),
        "sampling": SamplingSettings(),
        "reward": RecipeReward(),
        "group_size": 4,
    }
    return RolloutEngine(**{**parts, **changes})


def questions(count: int) -> list[Question]:
    return [Question(str(i), f"Question {i}?", ("yes",)) for i in range(count)]


def groups_of(
    engine: RolloutEngine, policy: GroupPolicy, count: int, finished: Callable[[Group], None]
) -> list[GroupToPlay]:
    budget = engine.failure_budget(count)
    tasks = (engine.task(place, question, key="0") for place, question in enumerate(questions(count)))
    return [GroupToPlay(task, policy, budget, finished) for task in tasks]


async def play(engine: RolloutEngine, policy: GroupPolicy, count: int) -> list[Group]:
    groups: list[Group] = []
    with anyio.fail_after(30):
        await engine.play_groups(groups_of(engine, policy, count, groups.append))
    return groups


def searcher(dialect: Dialect) -> ScriptedPolicy:
    """Searches once, then answers."""
    call, answer = dialect.write_call(["x"]), dialect.write_answer("yes")
    return ScriptedPolicy(lambda prompt: answer if "All about" in dialect.decode(prompt) else call)


async def test_every_question_gives_one_whole_scored_group(dialect: Dialect) -> None:
    policy = searcher(dialect)
    groups = await play(engine(dialect), policy, 7)
    assert sorted(group.question.id for group in groups) == [str(i) for i in range(7)]
    assert all(group.rewards == (1.0,) * 4 for group in groups)
    assert all(len(episode.turns) == 2 for group in groups for episode in group.episodes)


async def test_a_groups_first_turns_are_one_request(dialect: Dialect) -> None:
    policy = searcher(dialect)
    await play(engine(dialect), policy, 5)
    assert policy.requests == 5 + 5 * 4


async def test_a_finished_group_does_not_wait_for_a_slow_one(dialect: Dialect) -> None:
    """The first question's search hangs until every other group is done."""
    release = anyio.Event()

    class SlowForOne(DictSearch):
        async def search(self, queries: Any) -> Any:
            if queries == ("slow",):
                await release.wait()
            return await super().search(queries)

    def reply(prompt: list[int]) -> list[int]:
        text = dialect.decode(prompt)
        if "All about" in text:
            return dialect.write_answer("yes")
        return dialect.write_call(["slow" if "Question 0" in text else "fast"])

    seen: list[str] = []

    def finished(group: Group) -> None:
        seen.append(group.question.id)
        if len(seen) == 3:
            release.set()

    playing = engine(dialect, search=SlowForOne())
    with anyio.fail_after(30):
        await playing.play_groups(groups_of(playing, ScriptedPolicy(reply), 4, finished))
    assert seen[-1] == "0"
    assert sorted(seen) == ["0", "1", "2", "3"]


async def test_failed_episodes_are_kept_apart(dialect: Dialect) -> None:
    groups = await play(engine(dialect, search=BrokenSearch(), max_failed_fraction=1.0), searcher(dialect), 2)
    assert all(not group.episodes and len(group.failed) == 4 for group in groups)
    assert all("the store is gone" in (episode.error or "") for group in groups for episode in group.failed)


@pytest.mark.parametrize("cause", ["sampler", "search"])
async def test_too_many_failures_stop_the_run_and_say_why(dialect: Dialect, cause: str) -> None:
    broken = engine(dialect, search=BrokenSearch(), max_failed_fraction=0.25)
    policy = BrokenPolicy() if cause == "sampler" else searcher(dialect)
    with pytest.raises(ExceptionGroup) as caught:
        await play(broken, policy, 4)
    assert caught.group_contains(TooManyFailuresError, match="of 16 episodes failed.*gone")


async def test_a_fatal_fault_of_the_search_stops_the_run_at_once(dialect: Dialect) -> None:
    search = BrokenSearch(is_fatal=True)
    with pytest.raises(ExceptionGroup) as caught:
        await play(engine(dialect, search=search, max_failed_fraction=1.0), searcher(dialect), 2)
    assert caught.group_contains(SearchError, match="the store is gone")


async def test_a_broken_reward_stops_the_run(dialect: Dialect) -> None:
    async def reward(episode: Any) -> float:
        raise RuntimeError("mine")

    with pytest.raises(ExceptionGroup) as caught:
        await play(engine(dialect, reward=reward), searcher(dialect), 2)
    assert caught.group_contains(RewardError, match="mine")


async def test_at_most_the_allowed_episodes_are_in_flight(dialect: Dialect) -> None:
    now = most = 0

    class Counting(DictSearch):
        async def search(self, queries: Any) -> Any:
            nonlocal now, most
            now += 1
            most = max(most, now)
            try:
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                return await super().search(queries)
            finally:
                now -= 1

    limited = engine(dialect, search=Counting(), sampling=SamplingSettings(max_episodes_in_flight=8))
    assert len(await play(limited, searcher(dialect), 10)) == 10
    assert most <= 8


async def test_cancelling_ends_every_episode(dialect: Dialect) -> None:
    began = ended = 0
    waiting = anyio.Event()

    class Hanging(DictSearch):
        async def search(self, queries: Any) -> Any:
            nonlocal began, ended
            began += 1
            if began == 8:
                waiting.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended += 1

    groups: list[Group] = []
    playing = engine(dialect, search=Hanging())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(playing.play_groups, groups_of(playing, searcher(dialect), 2, groups.append))
        await waiting.wait()
        tasks.cancel_scope.cancel()
    assert ended == 8
    assert groups == []


async def test_a_cut_group_keeps_the_members_that_have_ended(dialect: Dialect) -> None:
    """Three of four members wait for their search; the fourth answers immediately."""
    waiting = 0
    task = engine(dialect).task(0, questions(1)[0], key="")

    class Hanging(DictSearch):
        async def search(self, queries: Any) -> Any:
            nonlocal waiting
            waiting += 1
            if waiting == 3:
                task.cut()
            await anyio.sleep_forever()

    replies = itertools.cycle([dialect.write_answer("yes"), *[dialect.write_call(["x"])] * 3])
    playing = engine(dialect, search=Hanging())
    with anyio.fail_after(30):
        group = await playing.play_group(task, ScriptedPolicy(lambda prompt: next(replies)), playing.failure_budget(1))
    assert [episode.answer for episode in group.episodes] == ["yes"]
    assert group.rewards == (1.0,)
    assert task.is_cut
    assert task.group() == group


async def test_an_episode_over_its_time_is_cut_with_its_turns_and_not_scored(dialect: Dialect) -> None:
    class Hanging(DictSearch):
        async def search(self, queries: Any) -> Any:
            await anyio.sleep_forever()

    limits = EpisodeLimits(max_turns=3, max_tokens=100, max_trajectory_tokens=2000, max_seconds=0.05)
    (group,) = await play(engine(dialect, search=Hanging(), limits=limits), searcher(dialect), 1)
    assert group.episodes == ()
    assert [episode.stop_reason for episode in group.failed] == [StopReason.TIME_LIMIT] * 4


async def test_a_first_turn_over_its_time_is_cut(dialect: Dialect) -> None:
    class Silent(ScriptedPolicy):
        async def sample_many(self, *args: Any, **kwargs: Any) -> Any:
            await anyio.sleep_forever()

    limits = EpisodeLimits(max_turns=3, max_tokens=100, max_trajectory_tokens=2000, max_seconds=0.05)
    (group,) = await play(engine(dialect, limits=limits), Silent(lambda prompt: ()), 1)
    assert [episode.stop_reason for episode in group.failed] == [StopReason.TIME_LIMIT] * 4


async def test_members_can_be_chosen_and_each_is_told_of_scored_the_moment_it_has_ended(dialect: Dialect) -> None:
    playing = engine(dialect)
    (question,) = questions(1)
    seen: list[tuple[int, float, int]] = []
    task = playing.task(7, question, key="0", members=(1, 3))

    def ended(member: int, episode: Episode) -> None:
        seen.append((member, episode.reward, len(task.finished)))

    group = await playing.play_group(task, searcher(dialect), playing.failure_budget(1), on_episode=ended)
    assert sorted(member for member, _, _ in seen) == [1, 3]
    assert [reward for _, reward, _ in seen] == [1.0, 1.0]
    assert [known for _, _, known in seen] == [1, 2], "reported one by one, not at the end"
    assert len(group.episodes) == 2
    assert playing.task(7, question, key="0").members == (0, 1, 2, 3)


async def test_groups_that_yield_sample_only_what_the_others_leave(dialect: Dialect) -> None:
    gate = SampleGate(SampleLimit(LimitSettings(first=1, least=1, most=1)))
    limits = EpisodeLimits(max_turns=3, max_tokens=100, max_trajectory_tokens=2000)
    playing = engine(dialect, group_size=1, player=LocalPlayer(dialect, DictSearch(), limits, gate, "split"))
    ended: list[bool] = []
    async with anyio.create_task_group() as tasks:
        for place, question in enumerate(questions(8)):
            yields = place < 4
            task = playing.task(place, question, key="0", yields=yields)
            on_episode = partial(lambda yields, member, episode: ended.append(yields), yields)
            play_one = partial(playing.play_group, on_episode=on_episode)
            tasks.start_soon(play_one, task, searcher(dialect), playing.failure_budget(1))
    # The first yielding request found an empty queue; all its later turns waited behind the others.
    assert ended == [False] * 4 + [True] * 4


def test_seeds_repeat_and_differ_by_question_place_and_run(dialect: Dialect) -> None:
    def seed(run: int, key: str, question: int) -> int | None:
        return engine(dialect, sampling=SamplingSettings(seed=run)).task(0, questions(9)[question], key=key).seed

    assert seed(1, "2", 3) == seed(1, "2", 3)
    assert len({seed(1, "2", 3), seed(2, "2", 3), seed(1, "3", 3), seed(1, "2", 4)}) == 4
    assert engine(dialect).task(0, questions(1)[0], key="").seed is None
