"""The main job over several seeds: does reinforcement learning beat the warm-up on held-out countries, every time?

    python -m benchmarks atlas_seeds --seeds 1 2 3 --folder runs/seeds

Each seed is a whole `make run` in a folder of its own (an interrupted benchmark goes on where it was).
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import time
from pathlib import Path

import polars as pl

from benchmarks.shared.report import write_result
from searchr1_async.cli.atlas import CONFIG, run_atlas
from searchr1_async.evaluation import Evaluation, comparison_table
from searchr1_async.records.run_records import RunRecords


def by_hop(evaluation: Evaluation) -> dict[str, Evaluation]:
    parts = sorted((str(hop), own) for (hop,), own in evaluation.scores.group_by("hop") if hop is not None)
    return {name: Evaluation(name, own, evaluation.step) for name, own in parts}


def largest_child() -> float:
    """Peak memory, in MB, of the largest process that this one has started and that has ended: the embedded service. On Linux."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def rows(seed: int, evaluations: tuple[Evaluation, ...], minutes: float, steps: int) -> list[dict[str, object]]:
    """One row an evaluation, whole and by hop."""
    out = []
    for evaluation in evaluations:
        for part, selected in (("all", evaluation), *by_hop(evaluation).items()):
            low, high = selected.exact_match_interval
            out.append(
                {
                    "seed": seed,
                    "stage": evaluation.label,
                    "hop": part,
                    "questions": selected.questions,
                    "exact_match": selected.exact_match,
                    "low": low,
                    "high": high,
                    "turns_per_episode": selected.turns_per_episode,
                    "valid_calls": selected.valid_call_fraction,
                    "answer_in_passage": selected.answer_in_passage,
                    "steps": steps,
                    "minutes": minutes,
                    "largest_process_so_far_mb": largest_child(),
                }
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args()
    table: list[dict[str, object]] = []
    body: list[str] = []
    for seed in options.seeds:
        began = time.monotonic()
        result, text = asyncio.run(run_atlas(options.folder / f"seed-{seed}", CONFIG.replace(seed=seed)))
        minutes = (time.monotonic() - began) / 60
        print(text, flush=True)
        table += rows(seed, result.evaluations, minutes, result.steps)
        hops = [
            f"{label}: " + ", ".join(f"{hop}-hop {part.exact_match:.2f}" for hop, part in by_hop(e).items())
            for label, e in ((e.label, e) for e in result.evaluations)
        ]
        training = RunRecords(result.out_dir).metrics().select("progress/batch", "env/all/correct", "time/total")
        reward = ", ".join(f"{value:.2f}" for value in training["env/all/correct"])
        body.append(
            f"## Seed {seed}: {result.steps} steps, {minutes:.1f} minutes in all, largest process so far {largest_child():,.0f} MB\n\n```\n"
            f"{comparison_table(result.evaluations)}\n```\n\n"
            f"By hop: {'; '.join(hops)}\n\nExact match of the training episodes by step: {reward}"
        )
    write_result("atlas_seeds", "The main job over several seeds", body, pl.DataFrame(table))
