"""``run``: the demo job. A small real model learns to search the Factbook, on one machine, without an API key.

It builds the index, evaluates the untrained model on held-out countries, warms it up on demonstrations, trains it, evaluates
again, and writes a table, a learning curve and a report.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from searchr1_async.api import train
from searchr1_async.boundary.paths import path_argument
from searchr1_async.cli.atlas_page import write_report
from searchr1_async.config import TrainConfig, WarmUp
from searchr1_async.data.questions import load_questions
from searchr1_async.episodes.types import Episode, Question
from searchr1_async.evaluation.report_text import comparison_rows, comparison_table, difference_line
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.folder import TrainingResult
from searchr1_async.runs.run import Run
from searchr1_async.search.search import Search
from searchr1_async.training.warm_up import Demonstration
from searchr1_async.watch.charts import draw


@dataclass(frozen=True, slots=True)
class AtlasSettings:
    """Settings of the demo job; the defaults take 15 minutes on 2 cores without a GPU."""

    out_dir: Path = Path("runs/atlas")
    seed: int = 2
    held_out: int = 120
    """Held-out questions, half one-hop and half two-hop; evaluating them takes about a minute."""
    training_questions: int = 1200
    two_hop_share: float = 0.5
    """Fraction of two-hop training questions; two searches per episode leave the most to learn."""
    warm_up_steps: int = 8
    steps: int = 40
    time_limit: float = 450.0
    """Seconds of reinforcement learning; the rest of the 15 minutes is needed elsewhere."""
    groups_per_batch: int = 8
    """Small: on two cores an episode takes about 0.5 s, a step 40 to 60 s."""
    group_size: int = 8
    minibatches: int = 4
    learning_rate: float = 1.5e-4
    """High, since there is time for about ten steps only; at 5e-4 the model degrades again."""
    lora_rank: int = 16
    max_tokens: int = 28
    """A search or an answer in tags takes 8 to 20 tokens; more lets an untrained model ramble."""
    max_turns: int = 3
    passage_words: int = 30
    """Words of the one closest passage shown to the 135M model."""
    model: str | None = None
    threads: int | None = None


def atlas_questions(settings: AtlasSettings) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, mixed one-hop and two-hop, drawn with the seed."""
    training = _mix(
        load_questions("atlas", split="train"), settings.training_questions, settings.two_hop_share, settings.seed
    )
    # The same held-out questions for every seed, so that runs are comparable.
    held_out = _mix(load_questions("atlas", split="held_out"), settings.held_out, 0.5, 0)
    return training, held_out


def _mix(questions: Sequence[Question], count: int, two_hop_share: float, seed: int) -> list[Question]:
    generator = random.Random(f"atlas/{seed}")
    by_hop = {hop: [q for q in questions if q.metadata.get("hop") == hop] for hop in (1, 2)}
    two = min(len(by_hop[2]), round(count * two_hop_share))
    chosen = generator.sample(by_hop[2], two) + generator.sample(by_hop[1], min(len(by_hop[1]), count - two))
    generator.shuffle(chosen)
    return chosen


def start_atlas(settings: AtlasSettings) -> tuple[Run, list[Question]]:
    """Starts or resumes the demo run; returns it with its held-out questions."""
    training, held_out = atlas_questions(settings)
    search = Search.local("atlas", n_results=1, max_passage_words=settings.passage_words)
    run = train(
        training,
        search,
        settings.out_dir,
        TrainConfig(
            model=settings.model,
            warm_up=WarmUp(steps=settings.warm_up_steps),
            format="tags",
            group_size=settings.group_size,
            groups_per_batch=settings.groups_per_batch,
            minibatches=settings.minibatches,
            steps=settings.steps,
            time_limit=settings.time_limit,
            learning_rate=settings.learning_rate,
            lora_rank=settings.lora_rank,
            max_turns=settings.max_turns,
            max_tokens=settings.max_tokens,
            max_trajectory_tokens=1024,
            seed=settings.seed,
            threads=settings.threads,
        ),
        resume=True,
        held_out=held_out,
        demonstrations=[Demonstration.of(question) for question in training[: settings.warm_up_steps * 20]],
    )
    return run, held_out


async def run_atlas(settings: AtlasSettings) -> tuple[TrainingResult, str]:
    """Runs the demo job; returns its result and the text to print."""
    run, _ = start_atlas(settings)
    result = await run
    files = await anyio.to_thread.run_sync(_write_files, settings, result)
    table = comparison_table(result.evaluations)
    return result, "\n".join([table, "", *files])


def _write_files(settings: AtlasSettings, result: TrainingResult) -> list[str]:
    records = RunRecords(result.out_dir)
    metrics = records.metrics()
    curve, report = result.out_dir / "learning_curve.png", result.out_dir / "report.html"
    draw(records, "learning", width=380, height=220).save(curve, scale_factor=2)
    write_report(
        report,
        title="A small model learns to search the Factbook",
        notes=[difference_line(result.evaluations)],
        summary=comparison_rows(result.evaluations),
        curve_png=curve,
        metrics=metrics,
        episodes=_example_episodes(result),
        settings={name: str(getattr(settings, name)) for name in settings.__slots__},
    )
    return [f"learning curve: {curve}", f"report with example episodes: {report}", f"records: {result.out_dir}"]


def _example_episodes(result: TrainingResult, count: int = 6) -> list[tuple[str, Episode]]:
    """The same held-out questions at every stage, those whose outcome changed most first."""
    if not result.evaluations:
        return []
    by_stage = [{episode.question.id: episode for episode in e.episodes} for e in result.evaluations]
    last, before = by_stage[-1], by_stage[-2 if len(by_stage) > 1 else 0]
    shared = [key for key in last if all(key in stage for stage in by_stage)]

    def change(key: str) -> float:
        return last[key].reward_parts.get("correct", 0.0) - before[key].reward_parts.get("correct", 0.0)

    ranked = sorted(shared, key=lambda key: -abs(change(key)))[:count]
    return [
        (evaluation.label, stage[key])
        for key in ranked
        for evaluation, stage in zip(result.evaluations, by_stage, strict=True)
    ]


def add_run(parser: argparse.ArgumentParser) -> None:
    defaults = AtlasSettings()
    parser.add_argument(
        "--out-dir", type=path_argument, default=defaults.out_dir, help="the run's folder (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps, help="maximum optimiser steps (%(default)s)")
    parser.add_argument("--time-limit", type=float, default=defaults.time_limit, help="seconds of RL (%(default)s)")
    parser.add_argument("--held-out", type=int, default=defaults.held_out, help="held-out questions (%(default)s)")
    parser.add_argument("--warm-up-steps", type=int, default=defaults.warm_up_steps)
    parser.add_argument("--groups-per-batch", type=int, default=defaults.groups_per_batch)
    parser.add_argument("--group-size", type=int, default=defaults.group_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the model (all cores)")
    parser.set_defaults(run=_run, stopped=_run_stopped)


async def _run(options: argparse.Namespace) -> str:
    given = {name: getattr(options, name) for name in AtlasSettings.__slots__ if hasattr(options, name)}
    began = time.monotonic()
    result, text = await run_atlas(AtlasSettings(**given))
    minutes = (time.monotonic() - began) / 60
    return f"\n{text}\n{result.steps} optimiser steps; {minutes:.1f} minutes in this session"


def _run_stopped(options: argparse.Namespace) -> str:
    return f"Finished steps are kept in {options.out_dir}; run the same command to resume."
