"""What an episode costs the client: CPU by part, memory by part, and who makes the event loop late.

    python -m benchmarks engine_cost --work FOLDER
    python -m benchmarks engine_cost --work FOLDER --sizes 64 --runs train train/cpu

The load is that of the throughput benchmark, all in one process. Three clients take turns: training with `max_staleness=1` (all parts), rollouts alone
(without a trainer), the SDK alone (the same turns of the same lengths, without searching, reading and recording). A cost is that
of a run that nothing looks at; further training runs, each in a fresh process, are looked at for one thing: `cpu` by a sampling
profiler (`pip install py-spy`), `late` by timing the callbacks of every event loop, `memory` by tracing allocations.

Goals: the engine takes at most 4 ms of CPU an episode beside the SDK; the loop is late by at most 25 ms (p99) and 60 ms (ever) at
128 x 8; each further episode in flight takes at most 100 KB.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_cost.report import report
from benchmarks.shared.client_figures import client_figures
from benchmarks.shared.contenders import Stage, contended, measured
from benchmarks.shared.scripted_episodes import GROUP_SIZE, World, episodes_seen
from benchmarks.throughput.floor import most_in_flight
from benchmarks.throughput.run import Job, contest_of, staged_world

STEPS = 2
"""With `max_staleness=1` both batches start at once."""
RUNS = ("train", "rollouts", "sdk", "train/cpu", "train/late", "train/memory")
PLAN = {64: RUNS, 128: RUNS, 512: ("train", "sdk", "train/cpu", "train/memory")}


@dataclass(frozen=True)
class Look:
    """One run."""

    client: str
    """`train`, `rollouts` or `sdk`."""
    groups: int
    look: str | None
    """What is looked at; None measures the cost."""


async def play(stage: Stage[World], look: Look) -> dict[str, Any]:
    """The row of one run."""
    load = os.getloadavg()[0]
    contender, mode = {
        "train": ("ours", "asynchronous"),
        "rollouts": ("ours", "rollouts"),
        "sdk": ("sdk", "sdk"),
    }[look.client]
    job = Job(contender, mode, look.groups, STEPS, options={"workers": 1})
    subjects = [subject for batch in job.batches for subject in batch]
    contest = contest_of(stage.world, job, "engine_cost", look=look.look, subjects=subjects)
    async with contended(stage, contest) as done:
        samples = [request for request in done.log if request.kind == "sample"]
        began, ended = min(each.began for each in samples), max(each.ended for each in done.log)
        episodes = len(subjects) * GROUP_SIZE
        return {
            "client": look.client,
            "groups": look.groups,
            "look": look.look,
            "episodes": episodes,
            "requests": len(samples),
            "in_flight": most_in_flight(episodes_seen(samples).values()),
            "wall": ended - began,
            **client_figures(done.observed, began, ended, episodes),
            "load_before": load,
            "late_seconds": sum(lag[1] for lag in done.observed.lags),
            "looked": json.loads((done.folder / "looked.json").read_text()) if look.client != "sdk" else [],
        }


async def run(options: argparse.Namespace, work: Path) -> None:
    looks = []
    for size in options.sizes:
        for name in options.runs or PLAN.get(size, RUNS):
            client, _, look = name.partition("/")
            looks.append(Look(client, size, look or None))
    async with staged_world(work, STEPS * max(options.sizes), 1.0, []) as stage:
        rows = await measured(looks, functools.partial(play, stage))
    report(rows, keep=options.keep or (not options.runs and set(options.sizes) == set(PLAN)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keeps the index; a folder for this once by default")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PLAN), help="groups a batch")
    parser.add_argument("--runs", nargs="+", choices=RUNS, help="which ones; all of each size by default")
    parser.add_argument("--keep", action="store_true", help="writes the result of a selection, as that of all runs is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as once:
        work = (options.work or Path(once)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        asyncio.run(run(options, work))
