"""What measuring held-out questions costs a training run: no measurement, one beside training, one that training waits for.

    python -m benchmarks evaluate_beside

The episodes of a scripted service have a long tail. The same run (the same episodes, by their seeds) is made three times: without
measurements, with one beside training after every second step, and with the same ones awaited, while no step ends. A measurement has
as many episodes as two batches. *Room* is a service that takes all samples at once; *tight* takes only as many as a batch has
episodes, so that those of a measurement wait for gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.testing import TimedReply
from tests.faults.script import _turn

GROUPS, MEMBERS, EVERY = 6, 4, 2
HELD_OUT = 12
"""Questions, each asked as often as a group has members: two batches."""
ARMS = ("none", "beside", "awaited")
MODES: dict[str, dict[str, Any]] = {"on-policy": {}, "asynchronous": {"max_staleness": 1}}
ROOMS: dict[str, dict[str, Any]] = {"room": {}, "tight": {"max_episodes_in_flight": GROUPS * MEMBERS}}
SLOWNESS = 2.0
"""A turn takes 0.2 s in the median, 3 s at most."""


def reply(prompt: list[int], chance: random.Random) -> TimedReply:
    """The scripted model; runs in the service's process."""
    return _turn(chance, "", SLOWNESS)


async def run_once(world: Path, url: str, arm: str, mode: str, room: str, steps: int) -> dict[str, Any]:
    """One run; its times in seconds."""
    import searchr1_async as sr
    from searchr1_async.events import EvaluationFinished, Event, PhaseStarted, StepFinished
    from tests import tiny_world
    from tests.faults import scripted_world

    began_training = last_step = 0.0
    measured = 0
    totals: list[float] = []

    def emit(event: Event) -> None:
        nonlocal began_training, last_step, measured
        if isinstance(event, PhaseStarted) and event.phase == "train":
            began_training = time.monotonic()
        elif isinstance(event, StepFinished):
            last_step = time.monotonic()
            totals.append(event.metrics["time/total"])
        elif isinstance(event, EvaluationFinished) and event.label.startswith("step"):
            measured += 1

    questions = scripted_world.questions()
    random.Random("split").shuffle(questions)
    settings: dict[str, Any] = scripted_world.SETTINGS | MODES[mode] | ROOMS[room] | {"epochs": 1}
    held_out, training = questions[:HELD_OUT], questions[HELD_OUT : HELD_OUT + GROUPS * steps]
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        await sr.train(
            training,
            scripted_world.make_search(world / "index"),
            out_dir=Path(scratch) / "run",
            service=url,
            reward=scripted_world.reward,
            held_out=held_out,
            on_event=emit,
            **tiny_world.given(
                sr.TrainConfig,
                settings,
                model="scripted",
                tokenizer=str(world / "tokenizer"),
                held_out_samples=MEMBERS,
                evaluate_every=None if arm == "none" else EVERY,
            ),
        )
        whole = time.monotonic() - began
    assert len(totals) == steps
    assert measured == (0 if arm == "none" else (steps - 1) // EVERY)
    return {
        "mode": mode,
        "room": room,
        "arm": arm,
        "training s": last_step - began_training,
        "step s": sum(totals) / steps,
        "run s": whole,
        "measured": measured,
    }


def awaiting() -> Callable[[], None]:
    """Has training wait for each measurement, as it did before; returns what undoes it."""
    from searchr1_async.training.held_out import Measuring

    usual = Measuring.wait_for_room

    async def wait_for_all(self: Measuring) -> None:
        await self._wait_until(lambda: not self._due)

    Measuring.wait_for_room = wait_for_all  # type: ignore[method-assign]

    def undo() -> None:
        Measuring.wait_for_room = usual  # type: ignore[method-assign]

    return undo


async def measure(rounds: int, steps: int, modes: Sequence[str]) -> pl.DataFrame:
    """All arms in turns, so that what else this machine does meets each of them."""
    from tests.faults import scripted_world

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch)
        async with scripted_world.service(world, "benchmarks.evaluate_beside.run:reply") as service:
            os.environ["TINKER_API_KEY"] = service.api_key
            for number in range(rounds):
                for mode in modes:
                    for room in ROOMS:
                        for arm in ARMS:
                            undo = awaiting() if arm == "awaited" else None
                            try:
                                row = await run_once(world, service.url, arm, mode, room, steps)
                            finally:
                                if undo is not None:
                                    undo()
                            rows.append({"round": number, **row})
                            print(rows[-1], flush=True)
    return pl.DataFrame(rows)


def write(table: pl.DataFrame, steps: int) -> None:
    from benchmarks.shared.report import write_result

    keys = ["mode", "room", "arm"]
    means = table.group_by(keys, maintain_order=True).agg(
        pl.col("training s", "step s", "run s").median(), pl.col("measured").max()
    )
    lines = [
        "| mode | samples at once | measuring | seconds a step | against none | training, s | whole run, s | measurements |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in means.iter_rows(named=True):
        none = means.filter(mode=row["mode"], room=row["room"], arm="none")["step s"][0]
        change = "" if row["arm"] == "none" else f"{row['step s'] / none - 1:+.1%}"
        at_once = "all" if row["room"] == "room" else f"{GROUPS * MEMBERS}"
        lines.append(
            f"| {row['mode']} | {at_once} | {row['arm']} | {row['step s']:.2f} | {change} | {row['training s']:.1f} | "
            f"{row['run s']:.1f} | {row['measured']} |"
        )
    body = [
        f"{steps} steps of {GROUPS} groups of {MEMBERS}, {table['round'].n_unique()} rounds, medians. After every second step "
        f"{HELD_OUT} held-out questions are asked {MEMBERS} times each: as many episodes as two batches. Every arm measures the "
        "untrained and the trained model besides. *beside*: this project; *awaited*: training waits for each measurement.",
        "\n".join(lines),
    ]
    write_result("evaluate_beside", "Measuring beside the training", body, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    options = parser.parse_args()
    write(asyncio.run(measure(options.rounds, options.steps, options.modes)), options.steps)
