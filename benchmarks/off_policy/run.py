"""Off-policy learning: the embedded model at several staleness bounds, with two losses, on the same questions.

    python -m benchmarks off_policy --work FOLDER
    python -m benchmarks off_policy --work FOLDER --seeds 1 --staleness 0 4 --losses ppo --steps 6
    python -m benchmarks off_policy --work FOLDER --model tiny --steps 3 --questions 12

Each seed has one warm-up; all of its runs start from these weights, with the same questions in the same order. The runs differ in
``max_staleness``, in the loss, and (``--in-flight``) in whether running episodes continue with newer weights. Measured: exact match
on held-out questions before and after, the distance between sampling and training weights (KL and the extremes of the ratio), time,
and for in-flight sampling the prompt tokens that had to be computed.

Finished runs stay in the work folder, so the same command continues where an earlier call stopped. An interrupted run starts over,
since its times would be of two sessions. The result is written when all runs are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

import searchr1_async as sr
from benchmarks.off_policy.report import report, row_of
from benchmarks.off_policy.world import World, atlas_world, tiny_world
from searchr1_async.local import LocalService, local_service
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.resume import ResumePoint

ONLY_WARM_UP = 1e-9
"""Seconds of reinforcement learning in which no step begins."""


@dataclass(frozen=True)
class Way:
    """One run."""

    seed: int
    staleness: int
    loss: str
    weights: str = "snapshot"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"seed-{self.seed}-staleness-{self.staleness}-{self.loss}-{self.weights}"


def planned(options: argparse.Namespace) -> list[Way]:
    """All runs, seed by seed, so that a stopped command leaves whole seeds."""
    ways = []
    for seed in options.seeds:
        ways += [Way(seed, staleness, loss) for staleness in options.staleness for loss in options.losses]
        ways += [Way(seed, staleness, options.losses[-1], "inflight") for staleness in options.in_flight]
    return ways


class Runs:
    """The runs of one command, over one embedded service.

    Args:
        world: what is learned.
        work: keeps every finished run.
        service: started, with its folder in the work folder.
        steps: optimizer steps a run.
    """

    def __init__(self, world: World, work: Path, service: LocalService, steps: int) -> None:
        self._world, self._work, self._steps = world, work, steps
        self._service = service.url
        self._model = {"model": service.model_name, "tokenizer": service.tokenizer_path}

    async def play(self, way: Way) -> dict[str, Any]:
        """The row of a run: that of an earlier command, or a fresh one.

        Raises:
            SearchR1Error: the run failed.
        """
        folder = self._work / way.name
        kept = folder / "row.json"
        if kept.exists():
            return json.loads(kept.read_text())
        start, before = await self._warmed_up(way.seed)
        load, began = os.getloadavg()[0], time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        result = await self._train(
            folder,
            way.seed,
            steps=self._steps,
            max_staleness=way.staleness,
            loss=way.loss,
            weights_in_flight=way.weights,
            start_from=start,
        )
        wall = time.monotonic() - began
        after = await self._measure(result.checkpoint)
        row = {
            "seed": way.seed,
            "staleness": way.staleness,
            "loss": way.loss,
            "weights": way.weights,
            "steps": result.steps,
            "questions": len(self._world.held_out),
            "exact_match_before": before,
            "exact_match_after": after,
            "wall": wall,
            "load_before": load,
            **row_of(RunRecords(folder)),
        }
        kept.write_text(json.dumps(row))
        return row

    async def _warmed_up(self, seed: int) -> tuple[str, float]:
        """The weights that a seed's runs start from, with their exact match on the held-out questions."""
        folder = self._work / f"seed-{seed}-warm-up"
        kept = folder / "start.json"
        if not kept.exists():
            shutil.rmtree(folder, ignore_errors=True)
            result = await self._train(folder, seed, warm_up=self._world.warm_up, time_limit=ONLY_WARM_UP)
            point = ResumePoint.load(folder)
            assert point is not None, "a finished run has a resume point"
            kept.write_text(json.dumps([point.state_path, await self._measure(result.checkpoint)]))
        path, exact_match = json.loads(kept.read_text())
        return path, exact_match

    async def _train(self, folder: Path, seed: int, **options: Any) -> sr.TrainingResult:
        return await sr.train(
            self._world.training(seed),
            self._world.search(),
            folder,
            sr.TrainConfig(seed=seed, **self._model, **self._world.playing, **self._world.learning).replace(**options),
            service=self._service,
            progress=False,
        )

    async def _measure(self, checkpoint: str | None) -> float:
        """Exact match of kept weights on the held-out questions, sampled as in training."""
        report = await sr.evaluate(
            list(self._world.held_out),
            self._world.search(),
            checkpoint,
            sr.EvalConfig(**self._model, **self._world.playing),
            service=self._service,
            progress=False,
        )
        return report.only.exact_match


def claim(work: Path, settings: dict[str, Any]) -> None:
    """Makes the work folder one of runs with these settings.

    Raises:
        SystemExit: it holds runs with others, which could not be compared.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    if path.exists() and (then := json.loads(path.read_text())) != settings:
        sys.exit(f"{work} holds runs with {then}, not {settings}: choose another --work folder")
    path.write_text(json.dumps(settings))


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all planned runs that did not fail."""
    work = options.work.resolve()
    claim(work, {name: getattr(options, name) for name in ("model", "steps", "questions", "groups")})
    sizes = options.questions, options.groups
    world = tiny_world(*sizes, work) if options.model == "tiny" else atlas_world(*sizes)
    rows = []
    async with local_service(
        world.model, folder=work / "service", threads=options.threads, log_path=work / "service.log", **world.service
    ) as service:
        os.environ["TINKER_API_KEY"] = service.api_key
        runs = Runs(world, work, service, options.steps)
        for way in planned(options):
            try:
                rows.append(await runs.play(way))
            except sr.SearchR1Error as error:
                print(f"{way.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/off_policy"), help="keeps the finished runs")
    parser.add_argument("--model", choices=("atlas", "tiny"), default="atlas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 4, 8])
    parser.add_argument("--losses", nargs="+", default=["ppo", "stable_reinforce"])
    parser.add_argument(
        "--in-flight",
        type=int,
        nargs="*",
        default=[4],
        metavar="STALENESS",
        help="runs with in-flight weights, with the last of the losses",
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps a run")
    parser.add_argument("--groups", type=int, default=4, help="questions a batch")
    parser.add_argument("--questions", type=int, default=40, help="held-out questions, each measured once")
    parser.add_argument("--threads", type=int, help="of the embedded service; all cores by default")
    parser.add_argument("--keep", action="store_true", help="writes the result though runs are missing or few")
    parser.add_argument("--note", default="", help="a sentence for the result, such as what else ran on the machine")
    options = parser.parse_args()
    rows = asyncio.run(measure(options))
    is_whole = options.model == "atlas" and len(options.seeds) >= 3 and len(rows) == len(planned(options))
    report(pl.DataFrame(rows), keep=is_whole or options.keep, note=options.note)
