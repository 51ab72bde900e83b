"""Whole runs through the public API: a real service process, SDK and Chroma, and a model that really learns."""

from __future__ import annotations

import gc
from pathlib import Path

import anyio
import polars as pl
import pytest

import searchr1_async as sr
from searchr1_async.events import CheckpointSaved, Event, RunEnded, StepFinished
from tests import tiny_world

RECIPE_COLUMNS = {
    "progress/batch",
    "progress/done_frac",
    "optim/lr",
    "optim/entropy",
    "optim/kl_sample_train_v1",
    "optim/kl_sample_train_v2",
    "time/total",
    *(
        f"env/{suite}/{name}"
        for suite in ("all", "world")
        for name in (
            "reward/total",
            "correct",
            "format",
            "turns_per_episode",
            "ac_tokens_per_turn",
            "ob_tokens_per_turn",
            "total_episodes",
            "total_turns",
            "total_ac_tokens",
            "total_ob_tokens",
            "by_group/frac_mixed",
            "by_group/frac_all_good",
            "by_group/frac_all_bad",
        )
    ),
}


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_run_learns_and_leaves_no_processes(tmp_path: Path) -> None:
    questions, held_out = tiny_world.make_questions()
    seen: list[Event] = []
    services: list[int] = []
    steps, group_size, per_batch = 18, 8, 12

    def emit(event: Event) -> None:
        seen.append(event)
        if isinstance(event, StepFinished) and event.step == 1:
            services.extend(tiny_world.service_processes())

    run = sr.train(
        questions,
        tiny_world.make_search(tmp_path / "index"),
        out_dir=tmp_path / "run",
        held_out=held_out,
        on_event=emit,
        **tiny_world.given(
            sr.TrainConfig,
            tiny_world.SETTINGS,
            model=str(tiny_world.model_folder()),
            held_out_samples=8,
            warm_up=tiny_world.WARM_UP,
            steps=steps,
            checkpoint_every=8,
        ),
    )
    assert not run.done
    result = await run
    assert run.done

    assert (result.steps, result.reason) == (steps, "finished")
    untrained, warm, trained = result.evaluations
    assert [e.label for e in result.evaluations] == ["untrained", "after warm-up", "after RL"]
    assert [e.step for e in result.evaluations] == [0, 0, steps]
    assert untrained.exact_match < 0.1
    assert 0.15 <= warm.exact_match <= 0.75, "the warm-up should leave something to win"
    assert trained.exact_match >= warm.exact_match + 0.15
    assert trained.samples_per_question == 8
    assert (trained.questions, trained.failed) == (len(held_out), 0)

    metrics = run.metrics
    assert set(metrics.columns) >= RECIPE_COLUMNS
    assert metrics["step"].to_list() == list(range(1, steps + 1))
    assert metrics["env/all/total_episodes"].to_list() == [per_batch * group_size] * steps
    # The service samples and trains with one model: before a step's update they agree to rounding.
    assert metrics["optim/kl_sample_train_v2"].max() < 1e-8
    assert metrics["env/all/stop/failed"].sum() == 0

    episodes = run.episodes().collect()
    assert episodes.height == steps * per_batch * group_size
    assert set(episodes["question_id"].unique()) == {question.id for question in questions}
    assert episodes.group_by("step").len()["len"].unique().to_list() == [per_batch * group_size]
    by_step = episodes.group_by("step", maintain_order=True).agg(pl.col("reward").mean())
    assert by_step["reward"].to_list() == pytest.approx(metrics["env/all/reward/total"].to_list())

    assert [e.step for e in seen if isinstance(e, StepFinished)] == list(range(1, steps + 1))
    assert [e.step for e in seen if isinstance(e, CheckpointSaved)] == list(range(steps + 1))
    assert isinstance(seen[-1], RunEnded)
    assert result.checkpoint is not None
    assert result.checkpoint.endswith(f"/sampler_weights/step-{steps:06d}")

    assert len(services) == 1, "one service, while the run lasted"
    assert tiny_world.service_processes() == []
    assert tiny_world.tasks_left() == set()

    # The folder holds what was learned: evaluated from there, in a new service, the score is the same.
    report = await sr.evaluate(
        held_out,
        tiny_world.make_search(tmp_path / "index"),
        systems=tmp_path / "run",
        **tiny_world.given(sr.EvalConfig, tiny_world.PLAYING, samples=8),
    )
    again = report.only
    assert again.step == steps
    assert again.exact_match >= warm.exact_match + 0.1
    assert tiny_world.service_processes() == []
    assert tiny_world.tasks_left() == set()


def test_two_event_loops_share_one_search(tmp_path: Path) -> None:
    questions, _ = tiny_world.make_questions()
    search = tiny_world.make_search(tmp_path / "index")
    service = tiny_world.shared_service()

    async def main(name: str) -> sr.TrainingResult:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TINKER_API_KEY", service.api_key)
            run = sr.train(
                questions,
                search,
                out_dir=tmp_path / name,
                **tiny_world.given(sr.TrainConfig, tiny_world.served_settings(), steps=1),
            )
            result = await run
        assert tiny_world.tasks_left() == set()
        return result

    for name in ("first", "second"):
        result = anyio.run(main, name, backend_options={"debug": True})
        assert (result.steps, result.reason) == (1, "finished")
    gc.collect()
    assert tiny_world.service_processes() == []


@pytest.mark.anyio
async def test_rollout_returns_groups_in_question_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    questions, _ = tiny_world.make_questions()
    settings = tiny_world.PLAYING | tiny_world.served()
    groups = await sr.rollout(
        questions[:5],
        tiny_world.make_search(tmp_path / "index"),
        **tiny_world.given(sr.RolloutConfig, settings, group_size=3, seed=1),
    )
    assert [group.question for group in groups] == questions[:5]
    assert all(len(group.episodes) == 3 and not group.failed for group in groups)
    assert all(len(turn.sampled_tokens) == len(turn.logprobs) for g in groups for e in g.episodes for turn in e.turns)
