"""Ours and tinker-cookbook as contenders: each in a fresh process, against a fresh scripted service and Gemini stand-in.

A contender is the module `benchmarks.FAMILY.ours` or `benchmarks.FAMILY.cookbook`, called with a file of settings. tinker-cookbook
comes from PyPI into an environment of its own in the work folder, made at the first run. The scripted model is
`benchmarks.FAMILY.model:reply`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import polars as pl
from aiohttp import web

from benchmarks.shared.chroma_index import COLLECTION, N_RESULTS, build_index, chroma_server
from benchmarks.shared.gemini_stand_in import StandInSettings, counts_of, stand_in_process
from benchmarks.shared.monitor import Observed
from benchmarks.shared.processes import ROOT, child_environment, command_of
from benchmarks.shared.scripted_episodes import WORLD_VARIABLE, World, make_passages
from searchr1_async.errors import ungrouped
from searchr1_async.local import LocalService, Scripted, local_service
from searchr1_async.local.model_files import DEFAULT_MODEL, resolve_model
from searchr1_async.local.process import Served
from tests.local.serving import read_log

MODEL = "Qwen/Qwen3.5-4B"
"""The name that both contenders ask for. The scripted model answers under it, with a ChatML tokenizer of this machine."""
COOKBOOK = "0.6.1"
SDK = "tinker==0.38.0"
CHROMA = "chromadb==1.5.9"
GEMINI = StandInSettings(latency=0.2, latency_per_text=0.001)
SEARCH_SECONDS = GEMINI.latency + GEMINI.latency_per_text
GEMINI_KEY = "a-key-of-the-benchmark"
PASSAGES = 10_000
RENDERERS = {"cookbook": "qwen3_instruct"}
"""Of the contenders that do not take ChatML."""
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

WorldT = TypeVar("WorldT", bound=World)
JobT = TypeVar("JobT")


@dataclass(frozen=True)
class Stage(Generic[WorldT]):
    """What all runs share."""

    work: Path
    world: WorldT
    tokenizer: str
    chroma: int


@dataclass(frozen=True)
class Contest:
    """One run of one contender."""

    family: str
    """The benchmark whose folder holds the contender's module and the scripted model."""
    contender: str
    label: str
    """Of the log that is kept if it fails."""
    timeout: float
    questions: pl.DataFrame
    """Of the recipe, which would download them."""
    split: str
    """Of these questions: `train` or `test`."""
    files: Callable[[Path], Mapping[str, Any]]
    """Writes what ours reads into a folder, and returns the settings that name it."""
    settings: Mapping[str, Any]
    """More settings of the contender."""
    scripted: Mapping[str, Any] = field(default_factory=dict)
    """More settings of the scripted service."""
    checkout: Path = ROOT
    """Whose code the contender runs; the services are always this checkout's."""


@dataclass(frozen=True)
class Contended:
    """What a run left, until its folder is deleted."""

    folder: Path
    log: Sequence[Served]
    observed: Observed
    requests: Mapping[str, int]
    """Sent to the embedding service, Chroma and the Tinker service."""


def tokenizer_folder() -> str:
    """The tokenizer of the scripted model."""
    return str(resolve_model(DEFAULT_MODEL))


@asynccontextmanager
async def staged(work: Path, index: Path, world: WorldT, contenders: Sequence[str]) -> AsyncIterator[Stage[WorldT]]:
    """A Chroma server over the world's passages, and the cookbook's environment if it is a contender."""
    await asyncio.to_thread(build_index, index, make_passages(world, PASSAGES))
    if "cookbook" in contenders:
        await cookbook_python(work)
    async with chroma_server(index) as chroma:
        yield Stage(work, world, tokenizer_folder(), chroma)


async def measured(jobs: Sequence[JobT], play: Callable[[JobT], Awaitable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every job's row; one that fails is reported and left out."""
    rows: list[dict[str, Any]] = []
    for job in jobs:
        began = time.monotonic()
        try:
            # A contender fails within the task groups of its services.
            with ungrouped(RuntimeError):
                row = await play(job)
        except (RuntimeError, ValueError) as error:
            print(f"{job}: {error}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        shown = {key: value for key, value in row.items() if not isinstance(value, list)}
        print(f"{time.monotonic() - began:.0f} s {json.dumps(shown)}", file=sys.stderr, flush=True)
    return rows


@asynccontextmanager
async def contended(stage: Stage[Any], contest: Contest) -> AsyncIterator[Contended]:
    """Runs a contender to its end.

    Raises:
        RuntimeError: it failed or took too long; its log is named.
    """
    with tempfile.TemporaryDirectory(dir=stage.work, prefix="run-") as name:
        folder = Path(name)
        drawn = folder / "drawn.jsonl"
        script = Scripted(
            f"benchmarks.{contest.family}.model:reply",
            tokenizer_path=stage.tokenizer,
            latency_log=str(drawn),
            **contest.scripted,
        )
        stage.world.save(folder / "world.json")
        os.environ[WORLD_VARIABLE] = str(folder / "world.json")
        async with stand_in_process(GEMINI) as gemini, google_account(folder, gemini) as google:
            async with local_service(MODEL, folder=folder / "service", threads=1, scripted=script) as service:
                await _contend(stage, contest, folder, gemini, google, service)
            counts = await counts_of(gemini)
        observed = Observed.read(folder / "observed.json")
        requests = {
            "embedding_requests": counts["requests"],
            "chroma_requests": _sent_to(observed, stage.chroma),
            "service_requests": _sent_to(observed, urlsplit(service.url).port),
        }
        yield Contended(folder, read_log(drawn), observed, requests)


def _sent_to(observed: Observed, port: int | None) -> int:
    return sum(count for key, count in observed.requests.items() if key.startswith(f"{port} "))


async def _contend(
    stage: Stage[Any], contest: Contest, folder: Path, gemini: str, google: Mapping[str, str], service: LocalService
) -> None:
    settings = {
        "model": MODEL,
        "renderer": RENDERERS.get(contest.contender, "chatml"),
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
        "looked": str(folder / "looked.json"),
        **contest.settings,
    }
    environment = child_environment(
        {"TINKER_API_KEY": service.api_key, "TINKER_BASE_URL": service.url, "TINKER_TELEMETRY": "0"}, contest.checkout
    )
    python, home = sys.executable, folder
    if contest.contender == "cookbook":
        python, home = str(await cookbook_python(stage.work)), folder / "home"
        # Only the repository: this process's other paths are of another environment.
        environment |= {**cookbook_home(home, contest.questions, contest.split), **google, "PYTHONPATH": str(ROOT)}
    else:
        settings |= contest.files(folder)
    (folder / "settings.json").write_text(json.dumps(settings))
    command = command_of(
        f"benchmarks.{contest.family}.{contest.contender}", str(folder / "settings.json"), python=python
    )
    process = await asyncio.create_subprocess_exec(*command, cwd=home, env=environment)
    try:
        code = await asyncio.wait_for(process.wait(), contest.timeout)
    except TimeoutError:
        code = None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code != 0:
        ended = f"did not end within {contest.timeout:g} s" if code is None else f"failed with exit code {code}"
        log = folder / "contender.log"
        if log.exists():  # else it failed before it opened its log, and wrote to this process's output
            kept = stage.work / f"failed-{contest.family}-{contest.contender}-{contest.label}.log"
            shutil.copy(log, kept)
            ended = f"{ended}; see {kept}"
        raise RuntimeError(ended)


async def cookbook_python(work: Path) -> Path:
    """The interpreter of tinker-cookbook's own environment, which is made at the first call; that takes minutes.

    The package is installed without its dependencies, and then what its metadata asks for, except that any version of
    ``tml-renderers`` is taken: 0.6.1 asks for 0.4.1, which not every index has, and uses it for the Inkling models only.

    Raises:
        RuntimeError: pip failed; its output is above.
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


def cookbook_home(folder: Path, questions: pl.DataFrame, split: str) -> dict[str, str]:
    """A home folder in which the recipe finds the questions that it would download: the environment that says so."""
    data = folder / ".cache" / "tinker-cookbook" / "PeterJinGo" / "nq_hotpotqa_train" / split
    data.mkdir(parents=True)
    questions.write_parquet(data / f"{split}.parquet")
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


def option(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` of a command line; the value as JSON where it is JSON."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
