"""Evaluation beside training, in whole runs on a real small model: which steps, which weights, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import tinker

import searchr1_async as sr
from searchr1_async.events import BatchClosed, Event, Notice, PhaseEnded, PhaseStarted
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.folder import training_questions
from searchr1_async.runs.resume import CheckpointList, kept_checkpoints
from searchr1_async.training.held_out import Measuring
from tests import tiny_world

pytestmark = pytest.mark.anyio

HELD_OUT = tiny_world.make_questions()[1]


async def varied(episode: sr.Episode) -> float:
    """Differs between members, so that every group is trained on, and is deterministic."""
    return sum(episode.tokens) % 7 / 7


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sr.Run]:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)

    def make(**changes: Any) -> sr.Run:
        settings = {"out_dir": tmp_path / "run", "reward": varied, "held_out": HELD_OUT, "evaluate_every": 1}
        settings |= tiny_world.served_settings(groups_per_batch=3) | changes
        search = tiny_world.make_search(tmp_path / "index", search_class=settings.pop("search_class", sr.Search))
        return sr.train(tiny_world.make_questions()[0][:18], search, **tiny_world.given(sr.TrainConfig, settings))

    return make


def is_measured(episode: sr.Episode) -> bool:
    """A held-out episode of trained weights."""
    return episode.question in HELD_OUT and any(turn.policy_version for turn in episode.turns)


class Held:
    """A reward that blocks the held-out episodes of trained weights until it is opened."""

    def __init__(self) -> None:
        self.opened, self.arrived = anyio.Event(), anyio.Event()

    async def __call__(self, episode: sr.Episode) -> float:
        if is_measured(episode):
            self.arrived.set()
            await self.opened.wait()
        return await varied(episode)


def steps_measured(run: sr.Run) -> dict[str, set[int]]:
    """By label, the weights that sampled its turns."""
    rows = run.evaluations().select("label", "policy_versions").collect().iter_rows()
    out: dict[str, set[int]] = {}
    for label, versions in rows:
        out.setdefault(label, set()).update(versions)
    return out


async def on_service(path: str) -> bool:
    client = await anyio.to_thread.run_sync(lambda: tinker.RestClient(base_url=tiny_world.shared_service().url))
    try:
        await client.get_weights_info_by_tinker_path(path)
    except tinker.NotFoundError:
        return False
    return True


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"max_staleness": 1}, id="asynchronous"),
        pytest.param({}, id="on-policy", marks=pytest.mark.slow),
        pytest.param({"synchronous": True}, id="synchronous", marks=pytest.mark.slow),
    ],
)
async def test_each_evaluation_uses_its_steps_weights(start: Callable[..., sr.Run], way: dict[str, Any]) -> None:
    paths: dict[int, tuple[str, ...]] = {}
    run = start(steps=3, evaluate_every=1, on_event=lambda event: look(event), **way)

    def look(event: Event) -> None:
        paths.update({one.step: one.paths for one in run.checkpoints if not one.for_good})

    result = await run
    labels = [(evaluation.label, evaluation.step) for evaluation in result.evaluations]
    assert labels == [("untrained", 0), ("step 1", 1), ("step 2", 2), ("after RL", 3)]
    assert steps_measured(run) == {"untrained": {0}, "step 1": {1}, "step 2": {2}, "after RL": {3}}
    (last,) = kept_checkpoints(run.out_dir)
    assert last.step == 3, "what was kept to be measured is gone"
    assert last.sampler_path == result.checkpoint
    assert len(last.paths) == 2, "the weights to sample from, and the state to export"
    assert set(paths) == {1, 2}
    for path in last.paths:
        assert await on_service(path)
    for path in [path for both in paths.values() for path in both]:
        assert not await on_service(path)


async def test_training_continues_during_an_evaluation(start: Callable[..., sr.Run]) -> None:
    """The evaluation of step 2 ends only when the last step is on disk."""
    held, events = Held(), list[Event]()

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, PhaseEnded) and event.phase == "train":
            held.opened.set()

    with anyio.fail_after(150):
        result = await start(steps=4, evaluate_every=2, reward=held, on_event=emit)
    assert [evaluation.label for evaluation in result.evaluations] == ["untrained", "step 2", "after RL"]
    named = [(event.phase, event.label) for event in events if isinstance(event, PhaseStarted)]
    assert named[1:] == [("evaluate", "untrained"), ("train", ""), ("evaluate", "step 2"), ("evaluate", "after RL")]
    ended = [event.phase for event in events if isinstance(event, PhaseEnded)]
    assert ended[1:3] == ["evaluate", "train"], "the measurement is the last to end"


async def test_training_waits_for_late_evaluations_and_says_why(start: Callable[..., sr.Run]) -> None:
    """One runs, two wait, and the third is one too many."""
    held, closed = Held(), list[int]()

    def emit(event: Event) -> None:
        if isinstance(event, BatchClosed):
            closed.append(event.step)
        if isinstance(event, Notice) and "an evaluation takes longer than 1 steps" in event.text:
            assert event.is_warning
            assert held.arrived.is_set()
            assert closed == [1, 2, 3, 4]
            held.opened.set()

    with anyio.fail_after(150):
        result = await start(steps=6, reward=held, on_event=emit)
    assert held.opened.is_set()
    assert [evaluation.step for evaluation in result.evaluations] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
async def test_evaluations_do_not_change_training(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    played = {}
    for every in (None, 1):
        run = start(steps=3, evaluate_every=every, out_dir=tmp_path / f"every-{every}", first_turn="shared")
        await run
        rows = run.episodes().sort("step", "question_id", "member")
        played[every] = rows.select("step", "question_id", "member", "reward", "transcript").collect()
    assert played[1].equals(played[None])


async def test_a_stop_during_an_evaluation_keeps_its_weights(
    start: Callable[..., sr.Run],
) -> None:
    held = Held()
    run = start(steps=3, reward=held)
    with anyio.fail_after(150):
        await held.arrived.wait()
        stopped = await run.stop()
    assert stopped.reason == "stopped"
    waiting = {one.step: one for one in run.checkpoints if not one.is_measured}
    assert 1 in waiting
    assert await on_service(waiting[1].sampler_path)
    held.opened.set()
    again = start(steps=3, reward=held, resume=True)
    result = await again
    assert steps_measured(again) == {"untrained": {0}, "step 1": {1}, "step 2": {2}, "after RL": {3}}
    assert [evaluation.step for evaluation in result.evaluations] == [0, 1, 2, 3]
    assert not await on_service(waiting[1].sampler_path) or waiting[1].for_good


@pytest.mark.slow
async def test_only_the_best_weights_are_kept(start: Callable[..., sr.Run]) -> None:
    paths: dict[int, tuple[str, ...]] = {}
    run = start(steps=4, keep_best=True, checkpoint_every=2, on_event=lambda event: look(event))

    def look(event: Event) -> None:
        paths.update({one.step: one.paths for one in run.checkpoints})

    result = await run
    found = {evaluation.step: evaluation.exact_match for evaluation in result.evaluations if evaluation.step}
    best = max(found, key=lambda step: (found[step], -step))
    kept = {one.step: one for one in run.checkpoints}
    assert set(kept) == {2, 4, best}
    assert {step: one.exact_match for step, one in kept.items()} == {step: found[step] for step in kept}
    assert result.best == run.best == kept[best]
    for step, both in paths.items():
        assert [await on_service(path) for path in both] == [step in kept] * 2


@pytest.mark.slow
async def test_a_failed_evaluation_ends_the_run(start: Callable[..., sr.Run]) -> None:
    async def reward(episode: sr.Episode) -> float:
        if is_measured(episode):
            raise ZeroDivisionError("no reward")
        return await varied(episode)

    run = start(steps=6, evaluate_every=2, reward=reward)
    with anyio.fail_after(150), pytest.raises(sr.errors.RewardError, match="no reward"):
        await run


async def test_overlapping_held_out_questions_are_refused_at_once(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    trained = tiny_world.make_questions()[0][3]
    same = sr.Question("other-id", trained.question.upper() + " ?!", ("x",), "elsewhere")
    with pytest.raises(
        sr.errors.ConfigurationError, match=r"1 of 13 held-out questions are also trained on.*other-id.*" + trained.id
    ):
        start(held_out=[*HELD_OUT, same])
    assert not (tmp_path / "run").exists()


async def test_keep_best_needs_evaluations(start: Callable[..., sr.Run]) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match="keep_best needs evaluate_every"):
        start(keep_best=True, evaluate_every=None)


@pytest.mark.slow
async def test_a_run_saves_its_questions(start: Callable[..., sr.Run]) -> None:
    run = start(steps=1, evaluate_every=None, held_out=())
    await run
    asked = tiny_world.make_questions()[0][:18]
    found = training_questions(run.out_dir)
    assert found is not None
    fields = [(one.id, one.question, one.golden_answers, one.data_source) for one in asked]
    assert [(one.id, one.question, one.golden_answers, one.data_source) for one in found] == fields
    (run.out_dir / "questions.parquet").unlink()  # as an earlier version left it: the recorded episodes tell
    played = training_questions(run.out_dir)
    assert played is not None
    assert {one.id for one in played} == set(run.episodes().collect()["question_id"])
    assert training_questions(run.out_dir / "nowhere") is None


async def test_no_evaluation_starts_after_the_time_limit(tmp_path: Path) -> None:
    """A queued evaluation is skipped and reported, though its weights exist."""
    notices: list[Event] = []
    config = sr.TrainConfig(evaluate_every=2, held_out_samples=1)
    job: Any = SimpleNamespace(held_out=HELD_OUT, config=config, out_dir=tmp_path)

    async def delete_unwanted(waiting: list[int]) -> None:
        assert waiting == []

    # Any request to the service or engine raises.
    session: Any = SimpleNamespace(job=job, control=RunControl(), emit=notices.append)
    kept, records = CheckpointList(tmp_path), RunRecords(tmp_path)
    recorder: Any = SimpleNamespace(records=records, kept=kept, point=None, delete_unwanted=delete_unwanted)
    measuring = Measuring(session, recorder)
    with anyio.fail_after(20):
        async with measuring.beside():
            assert [measuring.closed(step, is_last=step == 6) for step in (1, 2, 3, 4, 5, 6)] == [
                *(False, True, False, True),
                *(False, False),
            ]
            measuring.training_ended("time_limit")
            measuring.recorded(2, "tinker://run/sampler_weights/step-000002")
    assert notices == [Notice("time_limit was reached before the evaluation of step 2, 4: skipped")]
