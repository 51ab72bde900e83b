"""Overlapped rollout and training, in whole runs on a real small model: streaming, waiting, cutting, resuming."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import polars as pl
import pytest

import searchr1_async as sr
from searchr1_async.events import Event, GroupFinished, MinibatchSubmitted, Notice, PhaseStarted, StepFinished
from searchr1_async.testing import HashingEmbedder
from searchr1_async.training.admission import Admission, Closed
from tests import tiny_world

pytestmark = pytest.mark.anyio


_numbers = itertools.count()


async def varied(episode: sr.Episode) -> float:
    """Differs between members whatever the model does, so that every group is trained on."""
    return next(_numbers) % 11 / 11


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sr.Run]:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)

    def make(questions: int = 12, **changes: Any) -> sr.Run:
        settings = {"out_dir": tmp_path / "run", "reward": varied} | tiny_world.served_settings(**changes)
        search = tiny_world.make_search(tmp_path / "index", search_class=settings.pop("search_class", sr.Search))
        return sr.train(
            tiny_world.make_questions()[0][:questions], search, **tiny_world.given(sr.TrainConfig, settings)
        )

    return make


def assert_every_question_once(run: sr.Run, questions: int) -> pl.DataFrame:
    groups = run.groups().collect()
    assert sorted(groups["place"].to_list()) == list(range(questions))
    assert groups["question_id"].n_unique() == questions
    assert (groups["trained"] == groups["drop_reason"].is_null()).all()
    return groups


async def test_a_synchronous_step_trains_after_its_whole_rollout(start: Callable[..., sr.Run]) -> None:
    events: list[Event] = []
    await start(steps=1, synchronous=True, minibatches=3, on_event=events.append)
    kinds = [type(event) for event in events if isinstance(event, GroupFinished | MinibatchSubmitted)]
    assert kinds == [GroupFinished] * 6 + [MinibatchSubmitted] * 3


async def test_streaming_trains_during_the_last_group(start: Callable[..., sr.Run]) -> None:
    """One group's reward waits until a minibatch of the others was sent."""
    sent = anyio.Event()
    first = tiny_world.make_questions()[0][0].id

    async def reward(episode: sr.Episode) -> float:
        if episode.question.id == first:
            await sent.wait()
        return await varied(episode)

    def emit(event: Event) -> None:
        if isinstance(event, MinibatchSubmitted):
            sent.set()

    run = start(questions=6, epochs=1, reward=reward, on_event=emit)
    with anyio.fail_after(150):
        assert (await run).steps == 1
    assert assert_every_question_once(run, 6)["trained"].all()


async def test_with_staleness_the_next_batch_overlaps_training(start: Callable[..., sr.Run]) -> None:
    notices: list[str] = []
    run = start(
        questions=24,
        epochs=1,
        max_staleness=1,
        on_event=lambda event: notices.append(event.text) if isinstance(event, Notice) else None,
    )
    assert (await run).steps == 4
    groups = assert_every_question_once(run, 24)
    assert groups["trained"].all()
    assert groups.group_by("step").len()["len"].to_list() == [6] * 4
    age = groups["step"] - 1 - groups["policy_version_min"]
    assert age.max() == 1
    assert run.metrics["env/all/staleness_max"].max() == 1
    assert run.metrics["groups/version_spread"].to_list() == [0] * 4
    # From the second step on the weights are stale, so the default loss is an off-policy one.
    assert any("the loss is stable_reinforce" in text for text in notices)
    assert run.metrics["optim/fallback_datums"].to_list() == [0] * 4, "every sequence is known"
    assert run.metrics["optim/kl_sample_train_v2"].to_list()[1] > 0


async def test_running_episodes_keep_their_client_while_the_service_moves_its_weights(
    start: Callable[..., sr.Run],
) -> None:
    """The searches of two groups wait for the first step's weights; other groups make up the step."""
    stepped = anyio.Event()
    is_learning = False
    held = {str(question.metadata["search_queries"][0]) for question in tiny_world.make_questions()[0][:2]}

    class Slow(sr.Search):
        async def search(self, queries: Any, n_results: int | None = None, **options: Any) -> Any:
            if is_learning and held & set(queries):
                await stepped.wait()
            return await super().search(queries, n_results, **options)

    def emit(event: Event) -> None:
        nonlocal is_learning
        is_learning = is_learning or (isinstance(event, PhaseStarted) and event.phase == "train")
        if isinstance(event, StepFinished):
            stepped.set()

    settings: dict[str, Any] = {"max_staleness": 1, "weights_in_flight": "inflight", "warm_up": tiny_world.WARM_UP}
    run = start(epochs=1, group_size=8, search_class=Slow, on_event=emit, **settings)
    with anyio.fail_after(300):
        await run
    # A turn is labelled with the weights at its episode's start, so the age is an upper bound.
    assert run.metrics["groups/version_spread"].to_list() == [0, 0]
    assert run.metrics["env/all/staleness_max"].to_list() == [0, 1]
    episodes = run.episodes().collect()
    assert episodes["policy_versions"].list.len().max() == 1
    assert episodes.filter(pl.col("step") == 2)["trained"].any()


async def test_spare_groups_replace_the_slowest(start: Callable[..., sr.Run]) -> None:
    slow = {question.id for question in tiny_world.make_questions()[0][:2]}

    async def reward(episode: sr.Episode) -> float:
        if episode.question.id in slow:
            await anyio.sleep_forever()
        return await varied(episode)

    run = start(questions=8, epochs=1, spare_groups=2, reward=reward)
    with anyio.fail_after(150):
        assert (await run).steps == 1
    groups = assert_every_question_once(run, 8)
    assert set(groups.filter(pl.col("drop_reason") == "too_slow")["question_id"]) == slow
    assert groups["trained"].sum() == 6
    assert run.metrics["groups/dropped/too_slow"].to_list() == [2]


async def test_a_step_past_its_time_limit_uses_the_finished_groups(start: Callable[..., sr.Run]) -> None:
    """One group never ends; of another, two of four members do."""
    stuck, half = (question.id for question in tiny_world.make_questions()[0][:2])
    ended = 0

    async def reward(episode: sr.Episode) -> float:
        nonlocal ended
        if episode.question.id == stuck:
            await anyio.sleep_forever()
        if episode.question.id == half:
            ended += 1
            if ended > 2:
                await anyio.sleep_forever()
        return await varied(episode) + ended

    run = start(questions=6, epochs=1, step_time_limit=2.0, reward=reward)
    with anyio.fail_after(150):
        assert (await run).steps == 1
    groups = assert_every_question_once(run, 6)
    by_id = {row["question_id"]: row for row in groups.iter_rows(named=True)}
    assert by_id[stuck]["drop_reason"] == "step_time_limit"
    assert by_id[half]["trained"]
    assert by_id[half]["members"] == 2


async def test_a_step_that_is_full_at_its_time_limit_leaves_the_next_one_alone(
    start: Callable[..., sr.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline passes in the very turn of the event loop in which the batch is closed, too late to be cancelled."""
    closed, close = anyio.Event(), Admission.close

    def closing(admission: Admission, slow: Mapping[int, sr.Group]) -> Closed:
        closed.set()
        return close(admission, slow)

    async def sleep_until(deadline: float) -> None:
        if closed.is_set():
            await anyio.sleep_forever()
        with anyio.CancelScope(shield=True):
            await closed.wait()

    monkeypatch.setattr(Admission, "close", closing)
    run = start(questions=12, epochs=1, step_time_limit=60.0)
    monkeypatch.setattr(run.control, "sleep_until", sleep_until)
    with anyio.fail_after(150):
        assert (await run).steps == 2
    assert assert_every_question_once(run, 12)["trained"].all()


async def test_constant_reward_groups_are_refilled(start: Callable[..., sr.Run]) -> None:
    constant = {question.id for question in tiny_world.make_questions()[0][:4]}

    async def reward(episode: sr.Episode) -> float:
        return 0.0 if episode.question.id in constant else await varied(episode)

    run = start(questions=12, epochs=1, refill_groups=3, reward=reward)
    result = await run
    groups = assert_every_question_once(run, 12)
    assert set(groups.filter(pl.col("drop_reason") == "constant_reward")["question_id"]) == constant
    assert groups["trained"].sum() == 8
    assert result.steps == 2
    assert groups.filter(step=1)["trained"].sum() >= 5, "at most three of four are replaced in a step"


async def test_an_empty_batch_makes_no_optimizer_step_and_says_so(start: Callable[..., sr.Run]) -> None:
    async def reward(episode: sr.Episode) -> float:
        return 0.5

    events: list[Event] = []
    run = start(steps=2, reward=reward, on_event=events.append)
    assert (await run).steps == 2
    assert run.metrics["optim/steps"].to_list() == [0, 0]
    assert run.metrics["groups/trained"].to_list() == [0, 0]
    assert run.metrics["groups/dropped/constant_reward"].to_list() == [6, 6]
    assert sum("no group to learn from" in event.text for event in events if isinstance(event, Notice)) == 2


async def test_a_batch_may_have_several_optimizer_steps(start: Callable[..., sr.Run]) -> None:
    run = start(steps=1, optimizer_steps=3, minibatches=3)
    await run
    assert run.metrics["optim/steps"].to_list() == [3]


@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_resumed_run_does_not_repeat_finished_groups(start: Callable[..., sr.Run], staleness: int) -> None:
    """Stopped when some groups of the second step have finished: the resume trains on them unchanged."""
    stopped = anyio.Event()
    played: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, GroupFinished):
            played.append(event.group.question.id)
        if isinstance(event, StepFinished) or len(played) >= 9:
            stopped.set()

    settings: dict[str, Any] = {"questions": 18, "epochs": 1, "max_staleness": staleness, "on_event": emit}
    run = start(**settings)
    await stopped.wait()
    first = await run.stop()
    before = set(played)
    assert len(before) == len(played)
    done = set(run.groups().collect()["question_id"])
    assert len(done) == 6 * first.steps
    notices: list[str] = []
    settings["on_event"] = lambda event: (
        emit(event),
        notices.append(event.text) if isinstance(event, Notice) else None,
    )
    again = start(resume=True, **settings)
    assert (await again).steps == 3
    assert_every_question_once(again, 18)
    assert len(played) == 18, "no question is played twice"
    if before - done:
        (text,) = [text for text in notices if f"{len(before - done)} groups finished before" in text]
        assert ("trained on with ppo" in text) == bool(staleness)
    if staleness:
        counts = again.metrics.sum()
        assert counts["optim/fallback_datums"].to_list() == [4 * len(before - done)], "those, and no others"
        assert counts["optim/datums"].to_list() == [72]


async def test_groups_roll_out_in_workers_and_train_here(start: Callable[..., sr.Run]) -> None:
    run = start(questions=12, epochs=1, workers=2, max_staleness=1, warm_up=tiny_world.WARM_UP)
    result = await run
    assert result.steps == 2
    assert result.cost is not None
    for counted, column in (("prompt", "ob"), ("cached", "cached_ob"), ("sampled", "ac")):
        assert getattr(result.cost.tokens, counted) == run.metrics[f"env/all/total_{column}_tokens"].sum(), counted
    assert assert_every_question_once(run, 12)["trained"].all()
    episodes = run.episodes().collect()
    assert episodes["turn_count"].max() == 2, "searches are answered here"
    assert run.metrics["optim/fallback_datums"].to_list() == [0, 0], "workers record too"
    assert set(episodes["policy_versions"].explode()) <= {0, 1}


async def test_with_staleness_a_late_step_cuts_the_missing_groups(start: Callable[..., sr.Run]) -> None:
    """Three groups of two concurrent batches never end: the first step is cut short, and is not empty."""
    stuck = {question.id for question in tiny_world.make_questions()[0][:8]}

    async def reward(episode: sr.Episode) -> float:
        if episode.question.id in stuck:
            await anyio.sleep_forever()
        return await varied(episode)

    run = start(questions=12, epochs=1, max_staleness=1, step_time_limit=2.0, reward=reward)
    with anyio.fail_after(150):
        await run
    groups = assert_every_question_once(run, 12)
    assert groups["trained"].sum() == 4
    assert set(groups.filter(pl.col("drop_reason") == "step_time_limit")["question_id"]) == stuck
    assert groups.filter(step=1).height >= 6


async def test_a_service_that_fails_every_episode_stops_even_a_short_run(start: Callable[..., sr.Run]) -> None:
    class Broken(sr.Search):
        async def search(self, queries: Any, n_results: int | None = None, **options: Any) -> Any:
            if is_learning:
                raise sr.errors.StoreError("the store is down")
            return await super().search(queries, n_results, **options)

    is_learning = False

    def emit(event: Event) -> None:
        nonlocal is_learning
        is_learning = is_learning or (isinstance(event, PhaseStarted) and event.phase == "train")

    run = start(
        questions=4, epochs=1, groups_per_batch=50, search_class=Broken, on_event=emit, warm_up=tiny_world.WARM_UP
    )
    with pytest.raises(sr.errors.TooManyFailuresError, match="of 16 episodes failed"):
        await run


@pytest.mark.parametrize("last_step_is_done", [False, True])
async def test_an_interrupted_evaluation_runs_after_the_resume(
    last_step_is_done: bool, start: Callable[..., sr.Run]
) -> None:
    measuring = anyio.Event()

    def emit(event: Event) -> None:
        if last_step_is_done:
            is_time = isinstance(event, StepFinished) and event.step == 2
        else:
            is_time = isinstance(event, PhaseStarted) and event.label == "step 1"
        if is_time:
            measuring.set()

    settings: dict[str, Any] = {"steps": 2, "held_out": tiny_world.make_questions()[1][:4], "evaluate_every": 1}
    run = start(on_event=emit, **settings)
    await measuring.wait()
    await run.stop()
    result = await start(resume=True, **settings)
    assert [evaluation.label for evaluation in result.evaluations] == ["untrained", "step 1", "after RL"]


async def test_a_stop_cancels_index_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building = anyio.Event()

    class Endless(HashingEmbedder):
        async def embed_passages(self, texts: Any) -> Any:
            building.set()
            await anyio.sleep_forever()

    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    search = tiny_world.make_search(tmp_path / "index", embedder=Endless())
    run = sr.train(
        tiny_world.make_questions()[0],
        search,
        out_dir=tmp_path / "run",
        **tiny_world.given(sr.TrainConfig, tiny_world.served_settings()),
    )
    with anyio.fail_after(150):
        await building.wait()
        result = await run.stop()
    assert (result.steps, result.reason) == (0, "stopped")
