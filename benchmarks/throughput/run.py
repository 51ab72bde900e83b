"""Training at the service's own speed: our three ways of feeding learning beside those of tinker-cookbook's search recipe.

    python -m benchmarks throughput --work FOLDER
    python -m benchmarks throughput --work FOLDER --sizes 8 16 --runs ours/streaming cookbook/streaming
    python -m benchmarks throughput --work FOLDER --sizes 32 64 --keep \
        --runs ours/streaming ours/asynchronous cookbook/streaming cookbook/asynchronous
    python -m benchmarks throughput --work FOLDER --in-flight 4096

The embedded service with a scripted model (benchmarks/throughput/model.py) in a process of its own, a real `chroma run`, and a
stand-in for Gemini in a third. Each contender trains in a fresh process, against a fresh service and stand-in, on the same
episodes in the same batches (benchmarks/shared/scripted_episodes.py). tinker-cookbook comes from PyPI into an environment of its own in
the work folder, made at the first run. The floor is what the service's own draws allow (benchmarks/throughput/floor.py).

Asked of ours: streaming within 10 % of its floor; with weights up to one batch old at least twice the episodes a second of the
recipe's streaming, at a fifth of its client CPU; the event loop never late by over 50 ms; at most 60 KB an episode in flight; and
CPU an episode that does not grow with the batch.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl
from aiohttp import web

from benchmarks.shared.chroma_index import COLLECTION, N_RESULTS, build_index, chroma_server
from benchmarks.shared.gemini_stand_in import StandInSettings, counts_of, stand_in_process
from benchmarks.shared.monitor import Observed
from benchmarks.shared.scripted_episodes import GROUP_SIZE, World, make_passages, make_world, shuffled_to
from benchmarks.throughput.figures import figures
from benchmarks.throughput.model import WORLD_VARIABLE
from benchmarks.throughput.report import report
from searchr1_async.local import Scripted, local_service
from searchr1_async.local.models import DEFAULT_MODEL, resolve_model
from searchr1_async.local.scripted import TrainingTimes
from searchr1_async.local.scripted_log import read_log

MODEL = "Qwen/Qwen3.5-4B"
"""The name that both contenders ask for. The scripted model answers under it, with a ChatML tokenizer of this machine."""
COOKBOOK = "0.6.1"
SDK = "tinker==0.38.0"
CHROMA = "chromadb==1.5.9"
GEMINI = StandInSettings(latency=0.2, latency_per_text=0.001)
GEMINI_KEY = "a-key-of-the-benchmark"
TIMES = TrainingTimes(per_token=5e-6, optim_step=0.5, save=1.5)
"""512 examples of 1,500 tokens in 3.8 s."""
PASSAGES = 10_000
MOST_SUBJECTS = 2_048
STRETCHED = 4.0
"""What ``--in-flight`` multiplies latencies by, so that the first episodes still play when the last begin."""
SEED = 2
MINIBATCHES = 4
STEPS = {"synchronous": 2, "streaming": 2, "asynchronous": 3}
"""Optimiser steps a run; the pipelined ways need more to show that steps overlap."""
OURS = tuple(f"ours/{mode}" for mode in STEPS)
COOKBOOKS = tuple(f"cookbook/{mode}" for mode in STEPS)
PIPELINED = ("ours/streaming", "ours/asynchronous")
PLAN = {64: (*OURS, *COOKBOOKS), 128: (*OURS, "cookbook/streaming"), 256: PIPELINED, 512: ("ours/asynchronous",)}
"""The runs of each size in groups: the recipe's ways take too long for the larger ones."""
TIMEOUT = 900.0
"""Seconds a run may take."""
RENDERERS = {"ours": "chatml", "cookbook": "qwen3_instruct"}
_WRITE_NEEDS = """
import sys
from importlib.metadata import requires
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
needs = [need for need in map(Requirement, requires("tinker-cookbook"))
         if need.marker is None or need.marker.evaluate({"extra": "vector-search"})]
Path(sys.argv[1]).write_text("".join(
    f"{need.name}{'' if need.name == 'tml-renderers' else need.specifier}\\n" for need in needs))
"""
"""A program for the cookbook's interpreter: the requirements of the package and its extra, for pip."""


@dataclass(frozen=True)
class Stage:
    """What all runs share."""

    work: Path
    world: World
    tokenizer: str
    chroma: int


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

    @property
    def batches(self) -> list[range]:
        """The questions of each step, by number."""
        return [range(step * self.groups, (step + 1) * self.groups) for step in range(self.steps)]


# --- what the contenders need -------------------------------------------------------------------------------------------------


async def cookbook_python(work: Path) -> Path:
    """The interpreter of tinker-cookbook's own environment, which is made at the first call; that takes minutes.

    The package is installed without its dependencies, and then what its metadata asks for, except that any version of
    ``tml-renderers`` is taken: 0.6.1 asks for 0.4.1, which not every index has, and uses it for the Inkling models only.

    Raises:
        RuntimeError: pip failed; what it said stands above.
    """
    folder = work / f"cookbook-{COOKBOOK}"
    python, done, needs = folder / "bin" / "python", folder / "complete", folder / "needs.txt"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [*install, "--no-deps", f"tinker-cookbook=={COOKBOOK}"],
            [str(python), "-c", _WRITE_NEEDS, str(needs)],
            [*install, "--requirement", str(needs), SDK, CHROMA],
        ):
            process = await asyncio.create_subprocess_exec(*command)
            if await process.wait():
                raise RuntimeError(f"{' '.join(command)} failed")
        done.touch()
    return python


def cookbook_home(folder: Path, stage: Stage, job: Job) -> dict[str, str]:
    """A home folder in which the recipe finds what it would download: the environment that says so."""
    order = shuffled_to([subject for batch in job.batches for subject in batch], random.Random(SEED))
    rows = pl.DataFrame(
        [
            {
                "question": stage.world.subjects[subject].question,
                "golden_answers": [stage.world.subjects[subject].answer],
                "data_source": "nq",
            }
            for subject in order
        ]
    )
    data = folder / ".cache" / "tinker-cookbook" / "PeterJinGo" / "nq_hotpotqa_train" / "train"
    data.mkdir(parents=True)
    rows.write_parquet(data / "train.parquet")
    return {
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "GCP_VERTEXAI_PROJECT_NUMBER": "1",
        "GCP_VERTEXAI_REGION": "global",
    }


@asynccontextmanager
async def google_account(folder: Path, gemini: str) -> AsyncIterator[dict[str, str]]:
    """A service account for Vertex AI, which the recipe insists on, whose tokens come from a server of this machine: the
    environment that names it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    async def token(request: web.Request) -> web.Response:
        return web.json_response({"access_token": GEMINI_KEY, "expires_in": 36_000, "token_type": "Bearer"})

    application = web.Application()
    application.router.add_post("/token", token)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account",
            "project_id": "benchmark",
            "private_key_id": "1",
            "private_key": key.decode(),
            "client_email": "benchmark@benchmark.invalid",
            "token_uri": f"http://127.0.0.1:{runner.addresses[0][1]}/token",
        }
        path = folder / "account.json"
        path.write_text(json.dumps(account))
        yield {"GOOGLE_APPLICATION_CREDENTIALS": str(path), "GOOGLE_VERTEX_BASE_URL": gemini}
    finally:
        await runner.cleanup()


def our_questions(folder: Path, stage: Stage, job: Job) -> str:
    """A file of the questions that our order puts into the same batches."""
    order = shuffled_to([subject for batch in job.batches for subject in batch], random.Random(f"{SEED}/0"))
    rows = [
        {
            "id": str(subject),
            "question": stage.world.subjects[subject].question,
            "golden_answers": [stage.world.subjects[subject].answer],
            "data_source": "nq",
        }
        for subject in order
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- one run ------------------------------------------------------------------------------------------------------------------


async def play(stage: Stage, job: Job) -> dict[str, Any]:
    """The row of one run.

    Raises:
        RuntimeError: it failed, took too long, or trained on other than the planned steps; its log is named.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=stage.work, prefix="run-") as name:
        folder = Path(name)
        drawn = folder / "drawn.jsonl"
        script = Scripted(
            "benchmarks.throughput.model:reply",
            training=dataclasses.asdict(TIMES),
            seed=SEED,
            tokenizer_path=stage.tokenizer,
            latency_log=str(drawn),
        )
        stage.world.save(folder / "world.json")
        os.environ[WORLD_VARIABLE] = str(folder / "world.json")
        async with stand_in_process(GEMINI) as gemini, google_account(folder, gemini) as google:
            async with local_service(MODEL, folder=folder / "service", threads=1, scripted=script) as service:
                problem = await _contend(stage, job, folder, gemini, google, service.url, service.api_key)
            counts = await counts_of(gemini)
        if problem is not None:
            raise RuntimeError(problem)
        observed = Observed.read(folder / "observed.json")
        return figures(
            stage.world,
            job.batches,
            read_log(drawn),
            observed,
            times=TIMES,
            search_seconds=GEMINI.latency + GEMINI.latency_per_text,
            mode=job.mode,
        ) | {
            "contender": job.contender,
            "mode": job.mode,
            "groups": job.groups,
            "steps": job.steps,
            "loss": job.loss if job.mode == "asynchronous" else None,
            "load_before": load,
            "embedding_requests": counts["requests"],
            "chroma_requests": _sent_to(observed, stage.chroma),
            "service_requests": _sent_to(observed, urlsplit(service.url).port),
        }


def _sent_to(observed: Observed, port: int | None) -> int:
    return sum(count for key, count in observed.requests.items() if key.startswith(f"{port} "))


async def _contend(
    stage: Stage, job: Job, folder: Path, gemini: str, google: Mapping[str, str], url: str, api_key: str
) -> str | None:
    """Runs the contender to its end: None, or what was wrong, in words."""
    settings = {
        "mode": job.mode,
        "groups": job.groups,
        "group_size": GROUP_SIZE,
        "steps": job.steps,
        "minibatches": MINIBATCHES,
        "staleness": 1,
        "loss": job.loss,
        "seed": SEED,
        "model": MODEL,
        "renderer": RENDERERS[job.contender],
        "tokenizer": stage.tokenizer,
        "url": url,
        "chroma": stage.chroma,
        "collection": COLLECTION,
        "n_results": N_RESULTS,
        "gemini": gemini,
        "gemini_key": GEMINI_KEY,
        "out": str(folder / "out"),
        "log": str(folder / "contender.log"),
        "observed": str(folder / "observed.json"),
        "options": dict(job.options),
    }
    environment = {**os.environ, "TINKER_API_KEY": api_key, "TINKER_TELEMETRY": "0"}
    python, script, home = Path(sys.executable), Path(__file__).with_name(f"{job.contender}.py"), folder
    if job.contender == "cookbook":
        python, home = await cookbook_python(stage.work), folder / "home"
        environment |= {**cookbook_home(home, stage, job), **google}
        environment.pop("PYTHONPATH", None)
    else:
        settings["questions"] = our_questions(folder, stage, job)
    (folder / "settings.json").write_text(json.dumps(settings))
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
    if code != 0:
        kept = stage.work / f"failed-{job.contender}-{job.mode}-{job.groups}.log"
        shutil.copy(folder / "contender.log", kept)
        ended = f"did not end within {TIMEOUT:g} s" if code is None else f"failed with exit code {code}"
        return f"{ended}; see {kept}"
    return None


# --- all runs -----------------------------------------------------------------------------------------------------------------


async def measure(stage: Stage, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Every run's row; one that fails is told and left out."""
    rows: list[dict[str, Any]] = []
    for job in jobs:
        began = time.monotonic()
        try:
            row = await play(stage, job)
        except (RuntimeError, ValueError) as error:
            print(f"{job.contender}/{job.mode} {job.groups}: {error}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        shown = {key: value for key, value in row.items() if not isinstance(value, list)}
        print(f"{time.monotonic() - began:.0f} s {json.dumps(shown)}", file=sys.stderr, flush=True)
    return rows


def planned(options: argparse.Namespace) -> list[Job]:
    """The runs that were asked for."""
    jobs = []
    for size in options.sizes:
        for name in options.runs or PLAN.get(size, (*OURS, *COOKBOOKS)):
            contender, _, mode = name.partition("/")
            own = dict(options.ours) if contender == "ours" else {}
            jobs.append(Job(contender, mode, size, options.steps or STEPS[mode], options.loss, own))
    return jobs


async def run(options: argparse.Namespace, work: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = str(resolve_model(DEFAULT_MODEL).folder)
    if options.in_flight:
        jobs = [Job("ours", "streaming", options.in_flight // GROUP_SIZE, 1, options=dict(options.ours))]
    else:
        jobs = planned(options)
    scale = options.scale * (STRETCHED if options.in_flight else 1.0)
    # The same for all selections, so that an index that was built once serves them all.
    subjects = max(MOST_SUBJECTS, *(job.groups * job.steps for job in jobs))
    world = make_world(AutoTokenizer.from_pretrained(tokenizer), subjects, seed=SEED, scale=scale)
    index = work / f"chroma-{subjects}-{PASSAGES}"
    await asyncio.to_thread(build_index, index, make_passages(world, PASSAGES))
    if any(job.contender == "cookbook" for job in jobs):
        await cookbook_python(work)
    async with chroma_server(index) as chroma:
        rows = await measure(Stage(work, world, tokenizer, chroma), jobs)
    is_whole = not (options.in_flight or options.runs or options.ours) and set(options.sizes) == set(PLAN)
    report(rows, keep=is_whole or options.keep, in_flight=options.in_flight, note=options.note)


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="keeps the environment and the index; a folder for this once by default"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PLAN), help="groups a batch")
    parser.add_argument(
        "--runs", nargs="+", choices=(*OURS, *COOKBOOKS), help="which ones; all of each size by default"
    )
    parser.add_argument("--steps", type=int, help="optimiser steps a run; by default as each way needs")
    parser.add_argument("--loss", help="of the asynchronous ways; by default each contender's own")
    parser.add_argument("--keep", action="store_true", help="writes the result of a selection, as that of all runs is")
    parser.add_argument("--note", default="", help="a sentence for the result, such as what else ran on the machine")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all sampling latencies")
    parser.add_argument(
        "--in-flight", type=int, metavar="EPISODES", help="instead: one batch with all of these at once"
    )
    parser.add_argument(
        "--ours", type=_option, nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of `train`, to try"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as once:
        work = (options.work or Path(once)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        asyncio.run(run(options, work))
