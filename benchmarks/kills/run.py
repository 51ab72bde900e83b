"""Fifty SIGKILLs at random moments: each resumed run must train on the same questions as an uninterrupted run.

    python -m benchmarks kills
    python -m benchmarks kills --kills 10 --seed 3

A child process trains over one epoch of 60 questions on the embedded service with a scripted model, which runs in its own process and
survives the kills. After each kill the run is resumed. ``tests/faults/killing.py`` says what is checked after every kill and at every
run's end.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import polars as pl

from benchmarks.shared.report import write_result
from searchr1_async.local import LocalService
from tests.faults import scripted_world
from tests.faults.killing import (
    KINDS,
    Ledger,
    Plan,
    assert_epoch_is_whole,
    assert_same_outcome,
    outcome,
    train_through_kills,
)

PLANS: Mapping[str, Mapping[str, Any]] = {
    "on-policy": {},
    "synchronous": {"synchronous": True},
    "on-policy, refills": {"refill_groups": 3},
    "staleness 1": {"max_staleness": 1},
    "staleness 1, refills": {"max_staleness": 1, "refill_groups": 3},
    "staleness 1, spare groups": {"max_staleness": 1, "spare_groups": 2},
    "staleness 1, 2 workers": {"max_staleness": 1, "workers": 2},
    "staleness 2": {"max_staleness": 2},
    "staleness 2, weights in flight": {"max_staleness": 2, "weights_in_flight": "inflight"},
}
KILLS_A_RUN = 5


async def run(kills: int, seed: int) -> None:
    """Kills runs of all plans in turn until there were so many kills, and writes the result."""
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    kinds = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = Path(scratch)
        async with scripted_world.service(folder) as service:
            whole: dict[str, Path] = {}
            number = 0
            while kinds.total() < kills:
                name = list(PLANS)[number % len(PLANS)]
                plan = Plan(PLANS[name])
                if name not in whole:
                    whole[name] = folder / f"whole-{len(whole)}"
                    await _run(plan, whole[name], service, (), chance)
                moments = tuple(chance.choices(KINDS, k=min(KILLS_A_RUN, kills - kinds.total())))
                ledger = await _run(plan, folder / f"run-{number}", service, moments, chance)
                assert_same_outcome(plan, folder / f"run-{number}" / "run", whole[name] / "run")
                kinds.update(ledger.kills)
                rows.append(_row(name, plan, folder / f"run-{number}" / "run", ledger))
                print(f"{kinds.total()} of {kills} kills: {rows[-1]}", flush=True)
                number += 1
    _report(pl.DataFrame(rows), kinds)


async def _run(
    plan: Plan, folder: Path, service: LocalService, moments: tuple[str, ...], chance: random.Random
) -> Ledger:
    ledger = await anyio.to_thread.run_sync(partial(train_through_kills, plan, folder, service, moments, chance))
    assert_epoch_is_whole(plan, folder / "run")
    return ledger


def _row(name: str, plan: Plan, run: Path, ledger: Ledger) -> dict[str, Any]:
    ended = outcome(run)
    return {
        "run": name,
        "kills": len(ledger.kills),
        "killed in": ", ".join(ledger.kills),
        "after steps": ", ".join(map(str, ledger.steps_at_kills)),
        "questions": plan.questions,
        "trained": sum(reason is None for reason in ended.values()),
        "dropped": sum(reason is not None for reason in ended.values()),
        "groups kept over kills": ledger.kept,
        "not on disk yet": ledger.unsaved,
        "seconds before the kill, at most": round(ledger.oldest_unsaved, 2),
        "of weights never saved": ledger.futureless,
        "groups played twice": ledger.played.total() - len(ledger.played),
        "seconds": round(ledger.seconds, 1),
    }


def _report(table: pl.DataFrame, kinds: Counter[str]) -> None:
    names = ("kills", "groups kept over kills", "not on disk yet", "of weights never saved")
    kills, kept, unsaved, futureless = (table[name].sum() for name in names)
    age = table["seconds before the kill, at most"].max()
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * table.width]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.iter_rows()]
    write_result(
        "kills",
        "Runs killed at random moments",
        [
            f"{kills} SIGKILLs in {table.height} runs of {scripted_world.SETTINGS['groups_per_batch']} groups of "
            f"{scripted_world.SETTINGS['group_size']} a step, over one epoch each: "
            + ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
            + ". Every run ended with each question of its epoch in exactly one step, trained on or dropped with a reason, "
            "and with the same outcome for each question as an uninterrupted run of the same settings (with spare groups, "
            "whose drops depend on time: the same questions).",
            f"At the kills {kept} finished groups were on disk and in no step yet; none of them was played again. {unsaved} "
            f"were finished and not yet on disk (they gather for 0.2 s; the oldest was finished {age:.2f} s before its kill), and "
            f"{futureless} were on disk but sampled from weights that were published and never saved: those were played again, "
            "as were the groups under way.",
            "\n".join(lines),
        ],
        table,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    anyio.run(run, arguments.kills, arguments.seed)
