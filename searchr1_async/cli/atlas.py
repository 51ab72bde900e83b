"""``run``: the demo job. A small real model learns to search the Factbook, on one machine, without an API key.

It builds the index while it evaluates the untrained model on held-out countries, warms the model up on demonstrations, trains it and
evaluates it again. The table is printed; the learning curve and a page of the evaluated episodes are in the run's folder.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import anyio.to_thread

from searchr1_async.api import train
from searchr1_async.boundary.paths import path_argument
from searchr1_async.config import TrainConfig, WarmUp
from searchr1_async.data.questions import load_questions
from searchr1_async.episodes.types import Question
from searchr1_async.evaluation.report_tables import comparison_table
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.folder import TrainingResult
from searchr1_async.search.search import Search
from searchr1_async.training.initial_weights import Demonstration
from searchr1_async.watch.charts import draw
from searchr1_async.watch.episodes_page import view_run

CONFIG = TrainConfig(
    warm_up=WarmUp(steps=8),
    format="tags",
    seed=2,
    steps=40,
    time_limit=300.0,  # of 8 minutes on 2 cores; the rest is needed elsewhere
    min_steps=8,  # on a busy machine the job takes longer instead
    groups_per_batch=8,  # on two cores an episode takes about 0.5 s, a step about 30 s
    group_size=8,
    minibatches=4,
    learning_rate=1.5e-4,  # high, since there is time for about ten steps only; at 5e-4 the model degrades again
    lora_rank=16,
    max_tokens=28,  # a search or an answer in tags takes 8 to 20 tokens; more lets an untrained model ramble
    max_turns=3,
    max_trajectory_tokens=1024,
)
"""Settings of the demo job; they take 8 minutes on 2 cores without a GPU."""
HELD_OUT = 120
"""Held-out questions, half one-hop and half two-hop; evaluating them takes about a minute."""
_SETTINGS = {
    "seed": "of the run and its questions (%(default)s)",
    "steps": "maximum optimizer steps (%(default)s)",
    "time_limit": "seconds of RL (%(default)s)",
    "min_steps": "steps that the time limit does not prevent (%(default)s)",
    "group_size": "episodes per question (%(default)s)",
    "threads": "CPU threads of the model (all cores)",
    "memory_gb": "gigabytes that the embedded service plans with (a quarter of the machine's)",
}
_KINDS_OF_NONE = {"threads": int, "memory_gb": float}
"""Of the settings whose default is None."""


def add_run(parser: argparse.ArgumentParser) -> None:
    add_argument, usual = parser.add_argument, CONFIG.flat()
    add_argument("--out-dir", type=path_argument, default=Path("runs/atlas"), help="the run's folder (%(default)s)")
    add_argument("--held-out", type=int, default=HELD_OUT, help="held-out questions (%(default)s)")
    for name, text in _SETTINGS.items():
        kind = _KINDS_OF_NONE.get(name) or type(usual[name])
        add_argument(f"--{name.replace('_', '-')}", type=kind, default=usual[name], help=text)
    parser.set_defaults(
        run=_run,
        stopped=lambda options: f"Finished steps are kept in {options.out_dir}; run the same command to resume.",
    )


async def _run(options: argparse.Namespace) -> str:
    began = time.monotonic()
    config = CONFIG.replace(**{name: getattr(options, name) for name in _SETTINGS})
    result, text = await run_atlas(options.out_dir, config, options.held_out)
    minutes = (time.monotonic() - began) / 60
    return f"\n{text}\n{result.steps} optimizer steps; {minutes:.1f} minutes in this session"


async def run_atlas(
    out_dir: Path, config: TrainConfig = CONFIG, held_out: int = HELD_OUT
) -> tuple[TrainingResult, str]:
    """Runs or resumes the demo job; returns its result and the text to print. The seed also draws the training questions."""
    training = mixed_questions("train", 1200, seed=config.seed)
    warm_up = config.warm_up.steps if config.warm_up else 0
    result = await train(
        training,
        Search.local("atlas", n_results=1, max_passage_words=30),  # the closest passage, for a 135M model
        out_dir,
        config,
        resume=True,
        # The same for every seed, so that runs are comparable.
        held_out=mixed_questions("held_out", held_out, seed=0),
        demonstrations=[Demonstration.of(question) for question in training[: warm_up * 20]],
    )
    files = await anyio.to_thread.run_sync(_write_files, result)
    return result, "\n".join([comparison_table(result.evaluations), "", *files])


def mixed_questions(split: str, count: int, *, seed: int, two_hop_share: float = 0.5) -> list[Question]:
    """Questions of one hop and of two, drawn with the seed; two searches per episode leave the most to learn."""
    generator = random.Random(f"atlas/{seed}")
    questions = load_questions("atlas", split=split)
    one_hop, two_hop = ([q for q in questions if q.metadata.get("hop") == hop] for hop in (1, 2))
    two = min(len(two_hop), round(count * two_hop_share))
    chosen = generator.sample(two_hop, two) + generator.sample(one_hop, min(len(one_hop), count - two))
    generator.shuffle(chosen)
    return chosen


def _write_files(result: TrainingResult) -> list[str]:
    curve = result.out_dir / "learning_curve.png"
    draw(RunRecords(result.out_dir), "learning").save(curve, scale_factor=2)
    page = view_run(result.out_dir, labels=[evaluation.label for evaluation in result.evaluations] or None)
    return [f"learning curve: {curve}", f"evaluated episodes: {page}", f"records: {result.out_dir}"]
