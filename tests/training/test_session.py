"""The loop: streaming changes nothing, failures are no answers, and a disk fills up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import polars as pl
import pytest
import tinker
from tinker import types as tinker_types

import searchr1_async as sr
from searchr1_async.events import Event, MinibatchSubmitted, PhaseAdvanced, StepFinished, WeightsPublished
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs import resume as checkpoints
from searchr1_async.runs.folder import training_questions
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.search.faults import PassingFault
from searchr1_async.testing import HashingEmbedder
from tests import tiny_world

pytestmark = pytest.mark.anyio


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sr.Run]:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)

    def make(**changes: Any) -> sr.Run:
        settings = {"steps": 1, "out_dir": tmp_path / "run"} | tiny_world.served_settings(**changes)
        search = settings.pop("search", None) or tiny_world.make_search(tmp_path / "index")
        return sr.train(
            settings.pop("questions", tiny_world.make_questions()[0]),
            search,
            **tiny_world.given(sr.TrainConfig, settings),
        )

    return make


async def logprobs_of(checkpoint: str | None, tokens: Sequence[int]) -> list[float]:
    service = await anyio.to_thread.run_sync(lambda: tinker.ServiceClient(base_url=tiny_world.shared_service().url))
    try:
        weights: dict[str, Any] = (
            {"model_path": checkpoint} if checkpoint else {"base_model": str(tiny_world.model_folder())}
        )
        client = await (await anyio.to_thread.run_sync(lambda: service.create_sampling_client(**weights)))
        logprobs = await client.compute_logprobs(tinker_types.ModelInput.from_ints(list(tokens)))
        return [value for value in logprobs if value is not None]
    finally:
        await service.close("success")


async def test_streamed_minibatches_give_the_same_weights_as_one_batch(
    start: Callable[..., sr.Run], tmp_path: Path
) -> None:
    """The same seeded episodes, sent whole or in parts as they finish, sum to the same gradient.

    The reward tells members apart whatever the model does, so that every group is learned from.
    """

    async def reward(episode: sr.Episode) -> float:
        return sum(episode.tokens) % 7 / 7

    rewards, logprobs, sent = {}, {}, {}
    for minibatches in (1, 4):
        events: list[Event] = []
        settings: dict[str, Any] = {"minibatches": minibatches, "synchronous": minibatches == 1, "first_turn": "shared"}
        run = start(out_dir=tmp_path / f"run-{minibatches}", reward=reward, on_event=events.append, **settings)
        result = await run
        assert result.checkpoint is not None
        sent[minibatches] = sum(isinstance(event, MinibatchSubmitted) for event in events)
        rewards[minibatches] = run.episodes().sort("question_id", "member").collect()["reward"].to_list()
        logprobs[minibatches] = await logprobs_of(result.checkpoint, range(4, 60))
    assert sent[1] == 1
    assert sent[4] >= 4
    assert rewards[1] == rewards[4], "the episodes are the same"
    untrained = await logprobs_of(None, range(4, 60))
    change = max(abs(new - old) for new, old in zip(logprobs[1], untrained, strict=True))
    difference = max(abs(one - four) for one, four in zip(logprobs[1], logprobs[4], strict=True))
    assert change > 0.05, "the step did something"
    assert difference < 0.01 * change


class FallibleEmbedder(HashingEmbedder):
    """Its service goes down on request."""

    fails_after: anyio.Event | None = None

    async def embed_queries(self, texts: Sequence[str]) -> Any:
        if self.fails_after is not None:
            await self.fails_after.wait()
            raise PassingFault("the line is dead", cause="reset")
        return await super().embed_queries(texts)


async def test_a_failed_search_stops_the_run(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    embedder = FallibleEmbedder()
    pacing = sr.search.PacingSettings(max_outage=0.5, first_pause=0.02, longest_pause=0.1)
    # Without a cache: after one step every query of this small world has been asked.
    search = tiny_world.make_search(tmp_path / "index", embedder=embedder, pacing=pacing, cache_entries=0)
    warm_up = tiny_world.WARM_UP

    recorded = anyio.Event()

    def emit(event: Event) -> None:
        # A step is recorded while the next one is rolled out, which gets no answer until then.
        if isinstance(event, WeightsPublished) and event.step == 1:
            embedder.fails_after = recorded
        elif isinstance(event, StepFinished) and event.step == 1:
            recorded.set()

    settings: dict[str, Any] = {"search": search, "warm_up": warm_up, "steps": 3}
    run = start(on_event=emit, **settings)
    with pytest.raises(sr.errors.SearchUnavailableError, match=r"hashed words has been down for .*the line is dead"):
        await run
    assert run.metrics["step"].to_list() == [1]
    assert "the line is dead" not in str(run.episodes().collect().to_dicts())

    embedder.fails_after = None
    result = await start(resume=True, **settings)
    assert (result.steps, result.reason) == (3, "finished")
    assert run.metrics["step"].to_list() == [1, 2, 3]
    assert min(run.metrics["search/embedding/requests"]) > 0
    assert sum(run.metrics["search/queries"]) > sum(run.metrics["search/embedding/requests"])


async def test_a_few_failures_are_recorded_and_never_trained_on(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    """Searches for one place always fail: those episodes are left out, in the warm-up too, and the rest continues."""
    questions = tiny_world.make_questions()[0][:6]
    place = questions[0].id.partition("-")[2]

    class Partly(sr.Search):
        async def search(self, queries: Sequence[str], n_results: int | None = None, **options: Any) -> Any:
            if any(place in query for query in queries):
                raise sr.errors.StoreError("the store is down")
            return await super().search(queries, n_results)

    search = tiny_world.make_search(tmp_path / "index", search_class=Partly)
    run = start(questions=questions, search=search, warm_up=tiny_world.WARM_UP, group_size=8, max_failed_fraction=0.9)
    assert (await run).steps == 1
    episodes = run.episodes().collect()
    failed = episodes.filter(pl.col("stop_reason") == "failed")
    assert failed.height > 0
    assert failed["error"].str.contains("the store is down").all()
    assert not failed["trained"].any()
    assert failed["advantage"].is_null().all()
    assert run.metrics["env/all/failed_episodes"].to_list() == [failed.height]
    assert run.metrics["env/all/total_episodes"].to_list() == [episodes.height - failed.height]
    assert run.metrics["optim/datums"].to_list() == [episodes["trained"].sum()]


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["resume point", "records"])
async def test_a_full_disk_is_reported_and_the_run_resumes(
    start: Callable[..., sr.Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    target = (checkpoints, "write_atomically") if where == "resume point" else (RunRecords, "write_step")
    with monkeypatch.context() as patch:

        def emit(event: Event) -> None:
            if isinstance(event, StepFinished) and event.step == 1:
                patch.setattr(*target, full_disk)

        with pytest.raises(sr.errors.CheckpointError, match="No space left"):
            await start(steps=3, on_event=emit)
    point = ResumePoint.load(tmp_path / "run")
    assert point is not None
    assert point.step == 1
    run = start(steps=3, resume=True)
    result = await run
    assert (result.steps, result.reason) == (3, "finished")
    assert run.metrics["step"].to_list() == [1, 2, 3]


async def test_a_failing_reward_ends_the_run_with_its_name(start: Callable[..., sr.Run]) -> None:
    async def reward(episode: sr.Episode) -> float:
        raise KeyError("missing")

    with pytest.raises(sr.errors.RewardError, match="missing"):
        await start(reward=reward)


async def test_a_failed_start_does_not_block_the_next(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    """Neither its resume point of step 0 nor its settings, questions or tokenizer: nothing would be lost with them."""

    def broken(episode: sr.Episode) -> float:
        raise KeyError("missing")

    questions, folder = tiny_world.make_questions()[0], tmp_path / "run"
    with pytest.raises(sr.errors.RewardError, match="missing"):
        await start(reward=broken, questions=questions[:6])
    failed = ResumePoint.load(folder)
    assert failed is not None
    assert failed.step == 0
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(sr.errors.RewardError, match="missing"):  # with settings that could not be resumed
        await start(reward=broken, questions=questions[:6], learning_rate=2e-3, resume=True)
    result = await start(questions=questions[6:18], learning_rate=3e-3)
    assert (result.steps, result.reason) == (1, "finished")
    kept = training_questions(folder)
    assert kept is not None
    assert [question.id for question in kept] == [question.id for question in questions[6:18]]
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(sr.errors.RunFolderError, match=r"holds a run \(1 steps\): pass resume=True"):
        start()


async def test_a_stopped_warm_up_resumes(start: Callable[..., sr.Run], tmp_path: Path) -> None:
    learned: dict[str, int] = {"stopped": 0, "whole": 0}
    settings: dict[str, Any] = {"held_out": tiny_world.make_questions()[1][:2], "steps": 1, "resume": True}
    settings["warm_up"] = sr.WarmUp(steps=4, batch_size=4, learning_rate=4e-3)

    def begin(name: str, stop_after: int | None = None) -> sr.Run:
        def emit(event: Event) -> None:
            if isinstance(event, MinibatchSubmitted) and event.step == 0:
                learned[name] += 1
            if isinstance(event, PhaseAdvanced) and event.phase == "warm-up" and event.done == stop_after:
                run.request_stop()

        run = start(out_dir=tmp_path / name, on_event=emit, **settings)
        return run

    result = await begin("stopped", 2)
    assert (result.steps, result.reason, result.checkpoint) == (0, "stopped", None)
    (measured,) = (tmp_path / "stopped" / "evaluations").iterdir()
    before = measured.stat()
    point = ResumePoint.load(tmp_path / "stopped")
    assert point is not None
    assert point.warm_up is not None
    done = point.warm_up
    assert done in (2, 3)

    assert (await begin("stopped")).reason == "finished"
    again = measured.stat()
    assert (again.st_ino, again.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "measured once"
    assert learned["stopped"] - 4 <= 1, "only a step that the stop cut off is learned again"
    assert (await begin("whole")).reason == "finished"
    first = [run.checkpoints[0] for run in map(sr.open_run, (tmp_path / "stopped", tmp_path / "whole"))]
    weights = [await logprobs_of(one.sampler_path, range(4, 60)) for one in first]
    assert [one.step for one in first] == [0, 0]
    assert weights[0] == weights[1]
    assert weights[0] != await logprobs_of(None, range(4, 60))


async def test_a_time_limit_does_not_prevent_the_least_steps(start: Callable[..., sr.Run]) -> None:
    result = await start(steps=4, time_limit=1e-3, min_steps=2)
    assert (result.steps, result.reason) == (2, "time_limit")
    result = await start(steps=4, time_limit=1e-3, min_steps=3, resume=True)
    assert (result.steps, result.reason) == (3, "time_limit")


@pytest.mark.slow
async def test_the_weights_of_an_attempt_without_a_resume_point_are_deleted(
    start: Callable[..., sr.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As left by a kill before the first resume point, or by a lost resume point."""
    old = (await start()).checkpoint
    assert old is not None
    assert await logprobs_of(old, range(4, 9))
    (tmp_path / "run" / "state.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.CheckpointList, "clear", full_disk)
        with pytest.raises(sr.errors.CheckpointError, match="No space left"):
            await start()
    again = start()
    new = (await again).checkpoint
    assert [one.sampler_path for one in again.checkpoints] == [new]
    assert await logprobs_of(new, range(4, 9))
    with pytest.raises((tinker.TinkerError, ValueError)):
        await logprobs_of(old, range(4, 9))
