"""Evaluation at the service's own speed: all suites in one pool against suite by suite, ours and tinker-cookbook's.

    python -m benchmarks evaluation_throughput --work FOLDER
    python -m benchmarks evaluation_throughput --work FOLDER --places 256 --questions 500 --runs ours/pool
    python -m benchmarks evaluation_throughput --work FOLDER --places 16 --questions 40 --scale 0.5

Runs the embedded service with a scripted model (benchmarks/evaluation_throughput/model.py) that serves a fixed number of samples at a
time and queues the others, as a deployment does, with a real `chroma run` and a stand-in for Gemini. Each contender evaluates the same
episodes of seven suites in a fresh process, against a fresh service and stand-in. tinker-cookbook runs its recipe's own evaluation
command, in an environment of its own. The floor is that of the drawn turn times on that many places
(benchmarks/evaluation_throughput/floor.py).

Goal: the whole call, from its start to the report, within 10 % of the floor for 7 x 500 questions.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.evaluation_throughput.figures import figures
from benchmarks.evaluation_throughput.load import MOST_QUESTIONS, SUITES, SuiteWorld, asked, write_questions
from benchmarks.evaluation_throughput.marks import Marks
from benchmarks.evaluation_throughput.report import report
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
from benchmarks.shared.scripted_episodes import make_world

SEED = 4
RUNS = ("ours/pool", "ours/suites", "cookbook/suites")
PLAN = ((64, 500, ("ours/pool", "cookbook/suites")),)
"""Places, questions a suite (the recipe's own evaluation takes 100), and who plays: about 12 minutes in all. With 128 places the
cores of this machine are the limit, of either contender."""
TIMEOUT = 1200.0
"""Seconds an evaluation may take."""


@dataclass(frozen=True)
class Job:
    """One evaluation by one contender."""

    contender: str
    mode: str
    places: int
    questions: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of ours."""

    @property
    def suites(self) -> dict[str, range]:
        """The subjects of each suite."""
        return asked(self.questions)


async def play(stage: Stage[SuiteWorld], job: Job) -> dict[str, Any]:
    """The row of one evaluation.

    Raises:
        RuntimeError: it failed or took too long; its log is named.
        ValueError: it played other than the planned episodes.
    """
    subjects = stage.world.subjects
    questions = [
        {"question": subjects[number].question, "golden_answers": [subjects[number].answer], "data_source": suite}
        for suite, numbers in job.suites.items()
        for number in numbers
    ]

    def suite_files(folder: Path) -> dict[str, dict[str, str]]:
        paths = {suite: folder / f"{suite}.jsonl" for suite in SUITES}
        for suite, numbers in job.suites.items():
            write_questions(stage.world, suite, numbers, paths[suite])
        return {"suites": {suite: str(path) for suite, path in paths.items()}}

    contest = Contest(
        family="evaluation_throughput",
        contender=job.contender,
        label=f"{job.mode}-{job.places}",
        timeout=TIMEOUT,
        questions=pl.DataFrame(questions),
        split="test",
        files=suite_files,
        settings={"mode": job.mode, "questions": job.questions, "options": dict(job.options)},
        scripted={"max_concurrent": job.places, "seed": SEED},
    )
    async with contended(stage, contest) as done:
        return figures(
            stage.world,
            job.suites,
            done.log,
            done.observed,
            Marks.read(done.folder / "marks.json"),
            places=job.places,
            search_seconds=SEARCH_SECONDS,
        ) | {"contender": job.contender, "mode": job.mode, "questions": job.questions, **done.requests}


def planned(options: argparse.Namespace) -> list[Job]:
    """The evaluations that were asked for."""
    if options.places or options.questions:
        sizes = itertools.product(options.places or [64], options.questions or [MOST_QUESTIONS])
        plan = [(places, questions, RUNS) for places, questions in sizes]
    else:
        plan = list(PLAN)
    jobs = []
    for places, questions, runs in plan:
        for name in runs:
            contender, _, mode = name.partition("/")
            if not options.runs or name in options.runs:
                own = dict(options.ours) if contender == "ours" else {}
                jobs.append(Job(contender, mode, places, questions, own))
    return jobs


async def run(options: argparse.Namespace, work: Path) -> None:
    from transformers import AutoTokenizer

    subjects = len(SUITES) * MOST_QUESTIONS
    jobs = planned(options)
    world = SuiteWorld.of(
        make_world(AutoTokenizer.from_pretrained(tokenizer_folder()), subjects, seed=SEED, scale=options.scale)
    )
    index = work / f"chroma-evaluation-{PASSAGES}"
    async with staged(work, index, world, [job.contender for job in jobs]) as stage:
        rows = await measured(jobs, functools.partial(play, stage))
    is_whole = not (options.places or options.questions or options.runs or options.ours) and options.scale == 1
    report(rows, keep=is_whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="keeps the environment and the index; a folder for this once by default"
    )
    parser.add_argument("--places", type=int, nargs="+", help="samples that the service serves at a time")
    parser.add_argument(
        "--questions", type=int, nargs="+", metavar="COUNT", help=f"of each suite, at most {MOST_QUESTIONS}"
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, help="which ones; all of each size by default")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all sampling latencies")
    parser.add_argument(
        "--ours",
        type=option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of `evaluate`, to try",
    )
    options = parser.parse_args()
    if any(not 1 <= questions <= MOST_QUESTIONS for questions in options.questions or ()):
        parser.error(f"--questions: 1 to {MOST_QUESTIONS}")
    with tempfile.TemporaryDirectory() as once:
        work = (options.work or Path(once)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        asyncio.run(run(options, work))
