"""The handle to a run: stop, cancel, resume, refuse."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.events import (
    BatchClosed,
    EpisodeFinished,
    Event,
    PhaseStarted,
    RolloutSampled,
    RunEnded,
    RunPaused,
    RunResumed,
    RunStarted,
    StepFinished,
    WeightsPublished,
)
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.trackers import read_events
from tests import tiny_world

pytestmark = pytest.mark.anyio


class Watch:
    """Collects events; ``wait_for`` returns once one matches."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._came = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._came.set()

    async def wait_for(self, condition: Callable[[Event], bool], run: sr.Run) -> None:
        with anyio.fail_after(120):
            while not any(map(condition, self.events)):
                assert not run.done, await run
                self._came.clear()
                await self._came.wait()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sr.Run]:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    search = tiny_world.make_search(tmp_path / "index")

    def make(**changes: Any) -> sr.Run:
        settings = {"steps": 4, "out_dir": tmp_path / "run"} | tiny_world.served_settings(**changes)
        questions = settings.pop("questions", tiny_world.make_questions()[0])
        return sr.train(questions, settings.pop("search", search), **tiny_world.given(sr.TrainConfig, settings))

    return make


def finished(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StepFinished) and event.step == step


def in_step(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, EpisodeFinished) and event.step == step


async def cell(run: sr.Run) -> None:
    """A notebook cell that awaits the run."""
    await run


async def uneven(episode: sr.Episode) -> float:
    """Differs within every group, so that every step trains."""
    return len(episode.turns[0].sampled_tokens) + sum(episode.turns[0].logprobs) / 100


def assert_whole(run: sr.Run, steps: int) -> None:
    """Every step once, in order, with all its episodes, and no question twice within the epoch."""
    assert run.metrics["step"].to_list() == list(range(1, steps + 1))
    episodes = run.episodes().collect()
    assert episodes["step"].unique(maintain_order=True).to_list() == list(range(1, steps + 1))
    by_question = episodes.group_by("question_id").len()
    assert by_question["len"].unique().to_list() == [4], "group_size episodes of every question, once in this epoch"
    assert by_question.height == 6 * steps


async def test_a_stopped_run_keeps_its_steps_and_resumes(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(on_event=watch)
    await watch.wait_for(in_step(2), run)
    result = await run.stop()
    assert run.done
    assert result.reason == "stopped"
    assert result.steps in (1, 2)
    assert result.checkpoint is not None
    assert result.checkpoint.endswith(f"step-{result.steps:06d}")
    assert sr.open_run(run.out_dir).result.reason == "stopped"
    assert_whole(run, result.steps)
    assert tiny_world.tasks_left() == set()

    again = Watch()
    run = start(on_event=again, resume=True)
    result = await run
    assert (result.steps, result.reason) == (4, "finished")
    assert sr.open_run(run.out_dir).result.reason == "finished"
    assert_whole(run, 4)
    assert await run.stop() is result, "a stop that comes too late changes nothing"


async def test_a_finished_run_returns_at_once_without_a_service(
    start: Callable[..., sr.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await start(steps=1)
    dead = "http://127.0.0.1:9"
    watch = Watch()
    second = await start(steps=1, resume=True, service=dead, on_event=watch)
    assert second == first
    assert not any(isinstance(event, PhaseStarted) for event in watch.events)
    with pytest.raises(sr.errors.ServiceUnavailableError):  # there is work left now
        await start(steps=2, resume=True, service=dead)
    third = await start(steps=2, resume=True)
    assert third.steps == 2


async def test_a_failure_is_in_the_folder_with_its_cause(start: Callable[..., sr.Run]) -> None:
    def broken(*_: object) -> float:
        raise ZeroDivisionError("no such reward")

    watch = Watch()
    run = start(reward=broken, on_event=watch)
    with pytest.raises(sr.errors.RewardError, match="no such reward"):
        await run
    recorded = sr.open_run(run.out_dir)
    assert recorded.result.reason == "failed"
    *_, cause, end = recorded.out_dir.joinpath("events.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(cause)["text"].startswith("RewardError: the reward function failed on question")
    assert json.loads(cause)["text"].endswith("ZeroDivisionError: no such reward")
    assert (json.loads(end)["event"], json.loads(end)["reason"]) == ("RunEnded", "failed")


async def test_a_run_stopped_before_its_first_step_starts_over(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    run = start()
    result = await run.stop()
    assert (result.steps, result.reason, result.checkpoint) == (0, "stopped", None)
    assert run.metrics.height == 0
    result = await start(steps=1, resume=True)
    assert (result.steps, result.reason) == (1, "finished")


async def test_cancelling_the_awaiting_task_closes_everything_first(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(on_event=watch)
    awaiting = asyncio.create_task(cell(run))
    await watch.wait_for(in_step(2), run)
    awaiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaiting
    assert run.done, "the wait ends only when the run has"
    assert tiny_world.tasks_left() == set()
    result = await start(resume=True)
    assert (result.steps, result.reason) == (4, "finished")
    assert_whole(run, 4)


async def test_a_cancelled_scope_waits_too(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(on_event=watch)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                await watch.wait_for(in_step(1), run)
                scope.cancel()

            tasks.start_soon(cancel)
            await run
    assert scope.cancelled_caught
    assert run.done
    assert tiny_world.tasks_left() == set()


async def test_forbidden_changes_are_named_and_others_apply(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    await start(steps=1)
    before = ResumePoint.load(tmp_path / "run")
    questions = tiny_world.make_questions()[0]
    for changes, named in (
        ({"learning_rate": 2e-3}, "learning_rate"),
        ({"group_size": 3}, "group_size"),
        ({"temperature": 0.5}, "temperature"),
        ({"max_turns": 3}, "max_turns"),
        ({"instructions": "another"}, "instructions"),
        ({"seed": 3}, "seed"),
        ({"questions": questions[:-1]}, "questions"),
        ({"search": tiny_world.make_search(tmp_path / "index", n_results=2)}, "search"),
    ):
        with pytest.raises(sr.errors.RunFolderError, match=named):
            await start(steps=2, resume=True, **changes)
    assert ResumePoint.load(tmp_path / "run") == before
    result = await start(steps=2, resume=True, checkpoint_every=1, max_failed_fraction=0.5)
    assert result.steps == 2


async def test_a_folder_with_a_run_is_not_overwritten(start: Callable[..., sr.Run]) -> None:
    run = start(steps=1)
    await run
    with pytest.raises(sr.errors.RunFolderError, match="resume=True"):
        start(steps=1)
    assert run.metrics.height == 1


async def test_a_folder_in_use_is_refused(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(steps=2, on_event=watch)
    await watch.wait_for(in_step(1), run)
    with pytest.raises(sr.errors.RunFolderError, match="another run"):
        await start(steps=2, resume=True)
    result = await run
    assert (result.steps, result.reason) == (2, "finished")
    assert_whole(run, 2)


async def test_a_run_ended_by_its_time_limit_can_resume(start: Callable[..., sr.Run]) -> None:
    result = await start(time_limit=1e-3)
    assert (result.steps, result.reason) in ((0, "time_limit"), (1, "time_limit"))
    result = await start(resume=True)
    assert (result.steps, result.reason) == (4, "finished")


async def test_a_run_reports_its_progress(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    run = start(steps=1)
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}, 0 steps, running)"
    assert run.out_dir == tmp_path / "run"
    assert run.metrics.height == 0
    assert run.episodes().collect().height == 0
    await run
    assert repr(run).endswith("1 steps, ended)")


async def test_events_can_be_iterated(start: Callable[..., sr.Run]) -> None:
    run = start(steps=2)
    seen = [event async for event in run]
    result = await run
    assert isinstance(seen[-1], RunEnded)
    assert seen[-1].reason == result.reason == "finished"
    assert [event.step for event in seen if isinstance(event, StepFinished)] == [1, 2]
    assert sum(isinstance(event, EpisodeFinished) for event in seen) == 2 * 6 * 4
    assert [event async for event in run] == [], "nothing comes any more"


async def test_a_steps_events_are_in_order(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    run = start(steps=1, reward=uneven)
    told = [type(event).__name__ async for event in run]
    await run
    order = [
        "RunStarted",
        "GroupFinished",
        "MinibatchSubmitted",
        "BatchClosed",
        "WeightsPublished",
        "StepFinished",
        "RunEnded",
    ]
    assert [told.index(name) for name in order] == sorted(told.index(name) for name in order)
    assert told.count("MinibatchLearned") == told.count("MinibatchSubmitted") >= 1
    kept = [event.name for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert [kept.index(name) for name in order] == sorted(kept.index(name) for name in order)


async def test_a_paused_run_sends_no_requests_and_resumes(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(steps=3, on_event=watch)
    await watch.wait_for(in_step(2), run)
    with anyio.fail_after(60):
        await run.pause()
    paused = len(watch.events)
    with anyio.fail_after(60):  # nothing is in flight at the services
        for _ in range(3):
            at = len(watch.events)
            await watch.wait_for(
                lambda event, at=at: isinstance(event, RolloutSampled) and event in watch.events[at:], run
            )
    sampled = [event for event in watch.events[paused:] if isinstance(event, RolloutSampled)]
    assert all(event.is_paused and event.sampling == event.searching == 0 for event in sampled)
    assert len({event.sampled_tokens for event in sampled}) == 1
    assert not run.done
    await run.resume()
    result = await run
    assert (result.steps, result.reason) == (3, "finished")
    assert_whole(run, 3)
    assert sum(isinstance(event, RunPaused) for event in watch.events) == 1
    assert sum(isinstance(event, RunResumed) for event in watch.events) == 1


async def test_asking_a_running_run_uses_its_newest_weights(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(steps=3, on_event=watch, reward=uneven, checkpoint_every=1)
    first = await run.ask("river of mirin?")  # waits for the services
    assert first.checkpoint is None
    await watch.wait_for(finished(1), run)
    newest, kept = (
        await run.ask("river of mirin?"),
        await run.ask("river of mirin?", step=1, config=sr.config.AskConfig(max_turns=1)),
    )
    assert newest.step is not None
    assert (first.step or 0) <= newest.step >= 1
    assert kept.checkpoint is not None
    assert kept.checkpoint.endswith("step-000001")
    assert (kept.step, len(kept.episode.turns), kept.episode.turns[0].policy_version) == (1, 1, 1)
    with pytest.raises(sr.errors.ConfigurationError, match="answers with its own service"):
        await run.ask("river of mirin?", service="http://127.0.0.1:9")
    with pytest.raises(sr.errors.QuestionsError, match="is no question"):
        await run.ask(" ")
    with pytest.raises(sr.errors.ConfigurationError, match="temperature is -1"):
        await run.ask("river of mirin?", config=sr.config.AskConfig(temperature=-1))
    assert (await run).reason == "finished"
    assert_whole(run, 3)
    played = [event.episode for event in watch.events if isinstance(event, EpisodeFinished)]
    assert len(played) == 3 * 6 * 4
    assert "asked" not in {episode.question.data_source for episode in played}
    assert run.metrics["rollout/samples"][-1] == sum(len(episode.turns) for episode in played)


async def test_a_paused_run_answers_and_stays_paused(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(steps=3, on_event=watch)
    await watch.wait_for(in_step(2), run)
    with anyio.fail_after(60):
        await run.pause()
        paused = len(watch.events)
        answer = await run.ask("river of mirin?")
        answered = len(watch.events)
        await watch.wait_for(lambda event: isinstance(event, RolloutSampled) and event in watch.events[answered:], run)
    assert answer.episode.turns
    meanwhile = watch.events[paused:]
    assert not any(isinstance(event, RunResumed) for event in meanwhile)
    # What follows the last sample, a search or the score, may still come.
    looks = [event for event in meanwhile if isinstance(event, RolloutSampled)]
    assert all(look.is_paused and not look.sampling for look in looks)
    await run.resume()
    assert (await run).steps == 3
    assert_whole(run, 3)


class LateSearch(sr.Search):
    may_open: asyncio.Event

    async def connect(self, on_progress: Any = None) -> None:
        await self.may_open.wait()
        await super().connect(on_progress)


async def test_a_run_that_ends_first_answers_with_its_last_weights(
    start: Callable[..., sr.Run], tmp_path: Path
) -> None:
    watch = Watch()
    run = start(steps=1, on_event=watch, reward=uneven)
    await watch.wait_for(in_step(1), run)
    search = tiny_world.make_search(tmp_path / "another", search_class=LateSearch)
    search.may_open = asyncio.Event()
    asking = asyncio.ensure_future(run.ask("river of mirin?", search))
    result = await run
    assert not asking.done()
    search.may_open.set()
    with anyio.fail_after(60):
        answer = await asking
    assert (answer.step, answer.checkpoint) == (1, result.checkpoint)
    assert tiny_world.tasks_left() == set()


async def test_an_ended_run_answers_with_its_last_weights(start: Callable[..., sr.Run]) -> None:
    run = start(steps=2, reward=uneven)
    result = await run
    answer = await run.ask("river of mirin?")  # its search was in memory, and its service named
    assert (answer.step, answer.checkpoint) == (2, result.checkpoint)
    with pytest.raises(sr.errors.ConfigurationError, match="pass search="):
        await sr.open_run(run.out_dir).ask("river of mirin?", service=tiny_world.served()["service"])
    assert tiny_world.tasks_left() == set()


async def test_a_run_that_ends_before_it_has_weights_cannot_answer(start: Callable[..., sr.Run]) -> None:
    run = start()
    asking = asyncio.ensure_future(run.ask("river of mirin?"))
    await run.stop()
    with pytest.raises(sr.errors.RunFolderError, match="holds no run"):
        await asking
    assert tiny_world.tasks_left() == set()


async def test_a_paused_run_can_be_stopped(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(on_event=watch)
    await watch.wait_for(in_step(1), run)
    await run.pause()
    result = await run.stop()
    assert result.reason == "stopped"
    assert tiny_world.tasks_left() == set()


async def test_a_stop_waits_for_the_current_optimizer_step(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(on_event=watch, reward=uneven)
    await watch.wait_for(lambda event: isinstance(event, BatchClosed) and event.step == 1, run)
    assert not any(isinstance(event, WeightsPublished) for event in watch.events)
    result = await run.stop()
    assert (result.steps, result.reason) == (1, "stopped")
    assert_whole(run, 1)


async def test_an_interrupt_stops_with_a_checkpoint(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(on_event=watch)
    awaiting = asyncio.create_task(cell(run))
    await watch.wait_for(in_step(2), run)
    awaiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaiting
    point = ResumePoint.load(run.out_dir)
    assert point is not None
    assert point.step >= 1
    assert point.sampler_step == point.step, "its last weights are kept for sampling"
    assert run.result.checkpoint == point.sampler_path
    assert watch.events[-1] == RunEnded("stopped")


async def test_a_second_interrupt_ends_it_too(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(on_event=watch)
    awaiting = asyncio.create_task(cell(run))
    await watch.wait_for(in_step(1), run)
    awaiting.cancel()
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    assert run.control.stop_requested
    awaiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaiting
    assert run.done
    assert tiny_world.tasks_left() == set()


async def test_a_run_is_reopened_by_its_folder(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    with pytest.raises(sr.errors.RunFolderError, match="holds no run"):
        sr.open_run(tmp_path / "run")
    watch = Watch()
    run = start(steps=2, on_event=watch)
    await watch.wait_for(lambda event: isinstance(event, RunStarted), run)
    assert sr.open_run(tmp_path / "run") is run, "it is under way in this process"
    result = await run
    opened = sr.open_run(tmp_path / "run")
    assert opened is not run
    assert opened.done
    assert opened.step == 2
    assert opened.metrics.equals(run.metrics)
    assert opened.episodes().collect().equals(run.episodes().collect())
    assert opened.settings["learning"]["group_size"] == 4
    assert (opened.result.steps, opened.result.checkpoint) == (2, result.checkpoint)
    row = run.episodes().collect().row(7, named=True)
    episode = opened.episode(row["step"], row["group"], row["member"])
    assert episode.question.id == row["question_id"]
    assert episode.reward == row["reward"]
    with pytest.raises(sr.errors.ConfigurationError, match="no episode 99"):
        opened.episode(1, 0, 99)


async def test_a_stop_after_the_last_weights_waits_for_their_record(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(steps=2, on_event=watch, reward=uneven)
    await watch.wait_for(lambda event: isinstance(event, WeightsPublished) and event.step == 2, run)
    assert not any(finished(2)(event) for event in watch.events)
    result = await run.stop()
    assert result.steps == 2
    assert_whole(run, 2)


async def test_a_stop_in_the_last_measurement_is_a_stop(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(steps=1, on_event=watch, held_out=tiny_world.make_questions()[1])
    await watch.wait_for(lambda event: isinstance(event, PhaseStarted) and event.label == "after RL", run)
    result = await run.stop()
    assert (result.steps, result.reason) == (1, "stopped")
    assert watch.events[-1] == RunEnded("stopped")
    result = await start(steps=1, resume=True, held_out=tiny_world.make_questions()[1])
    assert result.reason == "finished"
    assert [evaluation.label for evaluation in result.evaluations] == ["untrained", "after RL"]


def test_checking_a_folder_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(sr.errors.RunFolderError, match="holds no run"):
        sr.open_run(tmp_path / "no" / "such")
    assert list(tmp_path.iterdir()) == []


def test_train_needs_an_event_loop(tmp_path: Path) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match="async function"):
        sr.train("atlas", tiny_world.make_search(tmp_path / "index"), out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
