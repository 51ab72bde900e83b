"""Training at the service's own speed: our three ways of feeding learning against tinker-cookbook's search recipe.

    python -m benchmarks throughput --work FOLDER
    python -m benchmarks throughput --work FOLDER --sizes 8 16 --runs ours/streaming cookbook/streaming
    python -m benchmarks throughput --work FOLDER --sizes 32 64 --keep \\
        --runs ours/streaming ours/asynchronous cookbook/streaming cookbook/asynchronous
    python -m benchmarks throughput --work FOLDER --before CHECKOUT --runs before/streaming ours/streaming
    python -m benchmarks throughput --work FOLDER --in-flight 4096

Runs the embedded service with a scripted model (benchmarks/throughput/model.py), a real `chroma run` and a stand-in for Gemini, each
in its own process. Each contender trains in a fresh process, against a fresh service and stand-in, on the same episodes in the same
batches (benchmarks/shared/scripted_episodes.py). tinker-cookbook is installed from PyPI into the work folder at the first run. The
floor is what the service's drawn latencies allow (benchmarks/throughput/floor.py). Goals are in the report.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import os
import random
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.shared.contenders import (
    PASSAGES,
    SEARCH_SECONDS,
    Contest,
    Stage,
    contended,
    measured,
    option,
    staged,
    tokenizer_folder,
)
from benchmarks.shared.processes import ROOT
from benchmarks.shared.scripted_episodes import GROUP_SIZE, World, make_world, shuffled_to
from benchmarks.throughput.figures import figures
from benchmarks.throughput.report import report
from searchr1_async.local.process import TrainingTimes

TIMES = TrainingTimes(per_token=5e-6, optim_step=0.5, save=1.5)
"""512 examples of 1,500 tokens in 3.8 s."""
MOST_SUBJECTS = 2_048
STRETCHED = 4.0
"""What ``--in-flight`` multiplies latencies by, so that the first episodes still play when the last begin."""
SEED = 2
MINIBATCHES = 4
STEPS = {"synchronous": 2, "streaming": 2, "asynchronous": 3}
"""Optimizer steps a run; the pipelined ways need more to show that steps overlap."""
OURS = tuple(f"ours/{mode}" for mode in STEPS)
COOKBOOKS = tuple(f"cookbook/{mode}" for mode in STEPS)
BEFORES = tuple(f"before/{mode}" for mode in STEPS)
"""Ours of another checkout."""
PIPELINED = ("ours/streaming", "ours/asynchronous")
PLAN = {64: (*OURS, *COOKBOOKS), 128: (*OURS, "cookbook/streaming"), 256: PIPELINED, 512: ("ours/asynchronous",)}
"""The runs of each size in groups: the recipe's ways take too long for the larger ones."""
TIMEOUT = 900.0
"""Seconds a run may take."""


@dataclass(frozen=True)
class Job:
    """One run of one contender."""

    contender: str
    mode: str
    groups: int
    steps: int
    loss: str | None = None
    """Of the asynchronous ways; None is each contender's own default. The others learn on-policy by theirs."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkout: Path = ROOT
    """Whose code plays."""

    @property
    def batches(self) -> list[range]:
        """The questions of each step, by number."""
        return [range(step * self.groups, (step + 1) * self.groups) for step in range(self.steps)]


def rows_of(world: World, subjects: Sequence[int]) -> list[dict[str, Any]]:
    """Questions in the form of the published files."""
    return [
        {
            "id": str(subject),
            "question": world.subjects[subject].question,
            "golden_answers": [world.subjects[subject].answer],
            "data_source": "nq",
        }
        for subject in subjects
    ]


def contest_of(world: World, job: Job, family: str = "throughput", **more: Any) -> Contest:
    """A run as a contest, in which every contender gets the same questions in the same batches.

    Args:
        family: the benchmark that holds the contender.
        more: settings of its own.
    """
    subjects = [subject for batch in job.batches for subject in batch]

    def our_questions(folder: Path) -> dict[str, str]:
        """A file of the questions that our order puts into the same batches."""
        path = folder / "questions.jsonl"
        rows = rows_of(world, shuffled_to(subjects, random.Random(f"{SEED}/0")))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"questions": str(path)}

    return Contest(
        family=family,
        contender="ours" if job.contender == "before" else job.contender,
        label=f"{job.mode}-{job.groups}",
        timeout=TIMEOUT,
        questions=pl.DataFrame(rows_of(world, shuffled_to(subjects, random.Random(SEED)))).drop("id"),
        split="train",
        files=our_questions,
        settings={
            "mode": job.mode,
            "groups": job.groups,
            "group_size": GROUP_SIZE,
            "steps": job.steps,
            "minibatches": MINIBATCHES,
            "staleness": 1,
            "loss": job.loss,
            "seed": SEED,
            "options": dict(job.options),
            **more,
        },
        scripted={"training": dataclasses.asdict(TIMES), "seed": SEED},
        checkout=job.checkout,
    )


async def play(stage: Stage[World], job: Job) -> dict[str, Any]:
    """The row of one run.

    Raises:
        RuntimeError: it failed or took too long; its log is named.
        ValueError: it trained on other than the planned steps.
    """
    load = os.getloadavg()[0]
    async with contended(stage, contest_of(stage.world, job)) as done:
        return figures(
            stage.world,
            job.batches,
            done.log,
            done.observed,
            times=TIMES,
            search_seconds=SEARCH_SECONDS,
            mode=job.mode,
        ) | {
            "contender": job.contender,
            "mode": job.mode,
            "groups": job.groups,
            "steps": job.steps,
            "loss": job.loss if job.mode == "asynchronous" else None,
            "load_before": load,
            **done.requests,
        }


@asynccontextmanager
async def staged_world(
    work: Path, subjects: int, scale: float, contenders: Sequence[str]
) -> AsyncIterator[Stage[World]]:
    """What all runs share: a world of at least so many subjects, and its passages in Chroma."""
    from transformers import AutoTokenizer

    # The same for all selections, so that an index that was built once serves them all.
    subjects = max(MOST_SUBJECTS, subjects)
    world = make_world(AutoTokenizer.from_pretrained(tokenizer_folder()), subjects, seed=SEED, scale=scale)
    async with staged(work, work / f"chroma-{subjects}-{PASSAGES}", world, contenders) as stage:
        yield stage


def planned(options: argparse.Namespace) -> list[Job]:
    """The runs that were asked for."""
    jobs = []
    for size in options.sizes:
        for name in options.runs or PLAN.get(size, (*OURS, *COOKBOOKS)):
            contender, _, mode = name.partition("/")
            own = dict(options.ours) if contender == "ours" else {}
            checkout = options.before if contender == "before" else ROOT
            jobs.append(Job(contender, mode, size, options.steps or STEPS[mode], options.loss, own, checkout))
    return jobs


async def run(options: argparse.Namespace, work: Path) -> None:
    if options.in_flight:
        jobs = [Job("ours", "streaming", options.in_flight // GROUP_SIZE, 1, options=dict(options.ours))]
    else:
        jobs = planned(options)
    scale = options.scale * (STRETCHED if options.in_flight else 1.0)
    subjects = max(job.groups * job.steps for job in jobs)
    async with staged_world(work, subjects, scale, [job.contender for job in jobs]) as stage:
        rows = await measured(jobs, functools.partial(play, stage))
    is_whole = not (options.in_flight or options.runs or options.ours) and set(options.sizes) == set(PLAN)
    report(rows, keep=is_whole or options.keep, in_flight=options.in_flight, note=options.note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="keeps the environment and the index; a folder for this once by default"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PLAN), help="groups a batch")
    parser.add_argument(
        "--runs", nargs="+", choices=(*OURS, *COOKBOOKS, *BEFORES), help="which ones; all of each size by default"
    )
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="a folder whose code runs as `before/…`")
    parser.add_argument("--steps", type=int, help="optimizer steps a run; by default as each way needs")
    parser.add_argument("--loss", help="of the asynchronous ways; by default each contender's own")
    parser.add_argument("--keep", action="store_true", help="writes the result of a selection, as that of all runs is")
    parser.add_argument("--note", default="", help="a sentence for the result, such as what else ran on the machine")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all sampling latencies")
    parser.add_argument(
        "--in-flight", type=int, metavar="EPISODES", help="instead: one batch with all of these at once"
    )
    parser.add_argument(
        "--ours", type=option, nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of `train`, to try"
    )
    options = parser.parse_args()
    if options.before is None and any(name in BEFORES for name in options.runs or ()):
        parser.error("--runs before/… needs --before CHECKOUT")
    with tempfile.TemporaryDirectory() as once:
        work = (options.work or Path(once)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        asyncio.run(run(options, work))
