"""Evaluation at the service's own speed: all suites in one pool beside suite by suite, ours and tinker-cookbook's.

    python -m benchmarks evaluation_throughput --work FOLDER
    python -m benchmarks evaluation_throughput --work FOLDER --places 256 --questions 500 --runs ours/pool
    python -m benchmarks evaluation_throughput --work FOLDER --places 16 --questions 40 --scale 0.5

The embedded service with a scripted model (benchmarks/evaluation_throughput/model.py) that serves so many samples at a time, as a
deployment does; the others wait in its line. A real `chroma run`, and a stand-in for Gemini. Each contender evaluates the same
episodes of seven suites in a fresh process, against a fresh service and stand-in. tinker-cookbook has an environment of its
own, as in benchmarks/throughput; its evaluation is its recipe's own command. The floor is that of the drawn turn times on
that many places (benchmarks/evaluation_throughput/floor.py).

Asked of ours: the whole call, from its beginning to the report, within 10 % of the floor for 7 x 500 questions.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl

from benchmarks.evaluation_throughput.figures import figures
from benchmarks.evaluation_throughput.load import MOST_QUESTIONS, SUITES, SuiteWorld, asked, write_questions
from benchmarks.evaluation_throughput.marks import Marks
from benchmarks.evaluation_throughput.model import WORLD_VARIABLE
from benchmarks.evaluation_throughput.report import report
from benchmarks.shared.chroma_index import COLLECTION, N_RESULTS, build_index, chroma_server
from benchmarks.shared.gemini_stand_in import counts_of, stand_in_process
from benchmarks.shared.monitor import Observed
from benchmarks.shared.scripted_episodes import make_passages, make_world
from benchmarks.throughput.run import (
    GEMINI,
    GEMINI_KEY,
    MODEL,
    PASSAGES,
    RENDERERS,
    _option,
    cookbook_python,
    google_account,
)
from searchr1_async.local import LocalService, Scripted, local_service
from searchr1_async.local.models import DEFAULT_MODEL, resolve_model
from searchr1_async.local.scripted_log import read_log

SEED = 4
SEARCH_SECONDS = GEMINI.latency + GEMINI.latency_per_text
RUNS = ("ours/pool", "ours/suites", "cookbook/suites")
PLAN = ((64, 500, ("ours/pool", "cookbook/suites")),)
"""Places, questions a suite (the recipe's own evaluation takes 100), and who plays: about 12 minutes in all. With 128 places the
cores of this machine are the limit, of either contender."""
TIMEOUT = 1200.0
"""Seconds an evaluation may take."""


@dataclass(frozen=True)
class Stage:
    """What all runs share."""

    work: Path
    world: SuiteWorld
    tokenizer: str
    chroma: int


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


async def play(stage: Stage, job: Job) -> dict[str, Any]:
    """The row of one evaluation.

    Raises:
        RuntimeError: it failed or took too long; its log is named.
        ValueError: it played other than the planned episodes.
    """
    with tempfile.TemporaryDirectory(dir=stage.work, prefix="run-") as name:
        folder = Path(name)
        drawn = folder / "drawn.jsonl"
        script = Scripted(
            "benchmarks.evaluation_throughput.model:reply",
            max_concurrent=job.places,
            seed=SEED,
            tokenizer_path=stage.tokenizer,
            latency_log=str(drawn),
        )
        stage.world.save(folder / "world.json")
        os.environ[WORLD_VARIABLE] = str(folder / "world.json")
        async with stand_in_process(GEMINI) as gemini, google_account(folder, gemini) as google:
            async with local_service(MODEL, folder=folder / "service", threads=1, scripted=script) as service:
                problem = await _contend(stage, job, folder, gemini, google, service)
            counts = await counts_of(gemini)
        if problem is not None:
            raise RuntimeError(problem)
        observed = Observed.read(folder / "observed.json")
        row = figures(
            stage.world,
            job.suites,
            read_log(drawn),
            observed,
            Marks.read(folder / "marks.json"),
            places=job.places,
            search_seconds=SEARCH_SECONDS,
        )

        def sent_to(port: int | None) -> int:
            return sum(count for key, count in observed.requests.items() if key.startswith(f"{port} "))

        return row | {
            "contender": job.contender,
            "mode": job.mode,
            "questions": job.questions,
            "embedding_requests": counts["requests"],
            "chroma_requests": sent_to(stage.chroma),
            "service_requests": sent_to(urlsplit(service.url).port),
        }


async def _contend(
    stage: Stage, job: Job, folder: Path, gemini: str, google: Mapping[str, str], service: LocalService
) -> str | None:
    """Runs the contender to its end: None, or what was wrong, in words."""
    settings = {
        "mode": job.mode,
        "questions": job.questions,
        "model": MODEL,
        "renderer": RENDERERS[job.contender],
        "tokenizer": stage.tokenizer,
        "url": service.url,
        "chroma": stage.chroma,
        "collection": COLLECTION,
        "n_results": N_RESULTS,
        "gemini": gemini,
        "gemini_key": GEMINI_KEY,
        "out": str(folder / "out"),
        "log": str(folder / "contender.log"),
        "observed": str(folder / "observed.json"),
        "marks": str(folder / "marks.json"),
        "options": dict(job.options),
    }
    environment = {
        **os.environ,
        "TINKER_API_KEY": service.api_key,
        "TINKER_BASE_URL": service.url,
        "TINKER_TELEMETRY": "0",
    }
    python, home = Path(sys.executable), folder
    if job.contender == "cookbook":
        python, home = await cookbook_python(stage.work), folder / "home"
        environment |= {**_cookbook_home(home, stage, job), **google}
        environment.pop("PYTHONPATH", None)
    else:
        settings["suites"] = _suite_files(folder / "suites", stage, job)
    (folder / "settings.json").write_text(json.dumps(settings))
    script = Path(__file__).with_name(f"{job.contender}.py")
    process = await asyncio.create_subprocess_exec(
        str(python), str(script), str(folder / "settings.json"), cwd=home, env=environment
    )
    try:
        code = await asyncio.wait_for(process.wait(), TIMEOUT)
    except TimeoutError:
        code = None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code == 0:
        return None
    kept = stage.work / f"failed-evaluation-{job.contender}-{job.mode}-{job.places}.log"
    shutil.copy(folder / "contender.log", kept)
    ended = f"did not end within {TIMEOUT:g} s" if code is None else f"failed with exit code {code}"
    return f"{ended}; see {kept}"


def _suite_files(folder: Path, stage: Stage, job: Job) -> dict[str, str]:
    """A file a suite."""
    folder.mkdir()
    paths = {suite: folder / f"{suite}.jsonl" for suite in SUITES}
    for suite, subjects in job.suites.items():
        write_questions(stage.world, suite, subjects, paths[suite])
    return {suite: str(path) for suite, path in paths.items()}


def _cookbook_home(folder: Path, stage: Stage, job: Job) -> dict[str, str]:
    """A home folder in which the recipe finds the questions that it would download: the environment that says so."""
    rows = [
        {
            "question": stage.world.subjects[subject].question,
            "golden_answers": [stage.world.subjects[subject].answer],
            "data_source": suite,
        }
        for suite, subjects in job.suites.items()
        for subject in subjects
    ]
    data = folder / ".cache" / "tinker-cookbook" / "PeterJinGo" / "nq_hotpotqa_train" / "test"
    data.mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(data / "test.parquet")
    return {
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "GCP_VERTEXAI_PROJECT_NUMBER": "1",
        "GCP_VERTEXAI_REGION": "global",
    }


async def measure(stage: Stage, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Every evaluation's row; one that fails is told and left out."""
    rows: list[dict[str, Any]] = []
    for job in jobs:
        began = time.monotonic()
        try:
            row = await play(stage, job)
        except (RuntimeError, ValueError) as error:
            print(f"{job}: {error}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        shown = {key: value for key, value in row.items() if not isinstance(value, list)}
        print(f"{time.monotonic() - began:.0f} s {json.dumps(shown)}", file=sys.stderr, flush=True)
    return rows


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

    tokenizer = str(resolve_model(DEFAULT_MODEL).folder)
    subjects = len(SUITES) * MOST_QUESTIONS
    jobs = planned(options)
    world = SuiteWorld.of(
        make_world(AutoTokenizer.from_pretrained(tokenizer), subjects, seed=SEED, scale=options.scale)
    )
    index = work / f"chroma-evaluation-{PASSAGES}"
    await asyncio.to_thread(build_index, index, make_passages(world, PASSAGES))
    if any(job.contender == "cookbook" for job in jobs):
        await cookbook_python(work)
    async with chroma_server(index) as chroma:
        rows = await measure(Stage(work, world, tokenizer, chroma), jobs)
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
        type=_option,
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
