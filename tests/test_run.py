"""A run in the hand: stopped, cancelled, resumed, refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.events import EpisodeFinished, Event, PhaseStarted, StepFinished
from searchr1_async.learn.checkpoints import ResumePoint
from tests import tiny_world

pytestmark = pytest.mark.anyio


class Watch:
    """Collects events; ``wait_for`` returns when one has come that a condition holds for."""

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
        return sr.train(questions, settings.pop("search", search), **settings)

    return make


def finished(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StepFinished) and event.step == step


def in_step(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, EpisodeFinished) and event.step == step


def assert_whole(run: sr.Run, steps: int) -> None:
    """Every step once, in order, each with all its episodes, and no question twice within the epoch."""
    assert run.metrics["step"].to_list() == list(range(1, steps + 1))
    episodes = run.episodes().collect()
    assert episodes["step"].unique(maintain_order=True).to_list() == list(range(1, steps + 1))
    by_question = episodes.group_by("question_id").len()
    assert by_question["len"].unique().to_list() == [4], "group_size episodes of every question, once in this epoch"
    assert by_question.height == 6 * steps


async def test_a_stopped_run_keeps_its_steps_and_goes_on(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(emit=watch)
    await watch.wait_for(in_step(2), run)
    result = await run.stop()
    assert run.done
    assert result.reason == "stopped"
    assert result.steps in (1, 2)
    assert result.checkpoint is not None
    assert result.checkpoint.endswith(f"step-{result.steps:06d}")
    assert_whole(run, result.steps)
    assert tiny_world.tasks_left() == set()

    again = Watch()
    run = start(emit=again, resume=True)
    result = await run
    assert (result.steps, result.reason) == (4, "finished")
    assert_whole(run, 4)
    assert await run.stop() is result, "a stop that comes too late changes nothing"


async def test_a_finished_run_is_there_at_once_without_any_service(
    start: Callable[..., sr.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await start(steps=1)
    dead = "http://127.0.0.1:9"
    watch = Watch()
    second = await start(steps=1, resume=True, service=dead, emit=watch)
    assert second == first
    assert not any(isinstance(event, PhaseStarted) for event in watch.events)
    with pytest.raises(sr.ServiceUnavailableError):  # there is more to do now
        await start(steps=2, resume=True, service=dead)
    third = await start(steps=2, resume=True)
    assert third.steps == 2


async def test_a_run_stopped_before_its_first_step_begins_anew(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    run = start()
    result = await run.stop()
    assert (result.steps, result.reason, result.checkpoint) == (0, "stopped", None)
    assert run.metrics.height == 0
    result = await start(steps=1, resume=True)
    assert (result.steps, result.reason) == (1, "finished")


async def test_cancelling_whoever_awaits_closes_everything_first(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(emit=watch)

    async def cell() -> None:
        await run

    awaiting = asyncio.create_task(cell())
    await watch.wait_for(in_step(2), run)
    awaiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaiting
    assert run.done, "the wait ends only when the run has"
    assert tiny_world.tasks_left() == set()
    result = await start(resume=True)
    assert (result.steps, result.reason) == (4, "finished")
    assert_whole(run, 4)


async def test_a_cancelled_scope_waits_as_well(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(emit=watch)
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


async def test_what_may_not_change_is_named_and_what_may_is_taken(start: Callable[..., sr.Run], tmp_path: Path) -> None:
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
        with pytest.raises(sr.RunFolderError, match=named):
            await start(steps=2, resume=True, **changes)
    assert ResumePoint.load(tmp_path / "run") == before
    result = await start(steps=2, resume=True, checkpoint_every=1, max_failed_fraction=0.5)
    assert result.steps == 2


async def test_a_folder_with_a_run_is_not_overwritten(start: Callable[..., sr.Run]) -> None:
    run = start(steps=1)
    await run
    with pytest.raises(sr.RunFolderError, match="resume=True"):
        start(steps=1)
    assert run.metrics.height == 1


async def test_a_folder_in_use_is_refused_and_the_run_in_it_undisturbed(start: Callable[..., sr.Run]) -> None:
    watch = Watch()
    run = start(steps=2, emit=watch)
    await watch.wait_for(in_step(1), run)
    with pytest.raises(sr.RunFolderError, match="another run"):
        await start(steps=2, resume=True)
    result = await run
    assert (result.steps, result.reason) == (2, "finished")
    assert_whole(run, 2)


async def test_the_time_limit_ends_a_run_that_can_go_on(start: Callable[..., sr.Run]) -> None:
    result = await start(time_limit=1e-3)
    assert (result.steps, result.reason) == (1, "time_limit") if result.steps else (0, "time_limit")
    result = await start(resume=True)
    assert (result.steps, result.reason) == (4, "finished")


async def test_a_run_says_where_it_is(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    run = start(steps=1)
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}, running)"
    assert run.out_dir == tmp_path / "run"
    assert run.metrics.height == 0
    assert run.episodes().collect().height == 0
    await run
    assert repr(run).endswith("ended)")
