"""The embedded service through the real tinker SDK: how fast it samples and trains, and whether sampler and trainer agree.

    python -m benchmarks local_service

Goals: 32 requests at once give at least 8 times the tokens per second of one, and log-probabilities of sampler and trainer for the
same tokens differ by less than 1e-3 in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import polars as pl
import tinker

from benchmarks.shared.report import write_result
from benchmarks.shared.service_load import Load, agreement, sampled_per_second
from searchr1_async.local import DEFAULT_MODEL, local_service

LOAD = Load()


async def measure(model: str, threads: int | None, rounds: int) -> pl.DataFrame:
    """All figures of one service, as one row a figure."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        async with local_service(model, folder=Path(folder), threads=threads, dtype="float32") as service:
            client = tinker.ServiceClient(base_url=service.url, api_key=service.api_key)
            trainer = await client.create_lora_training_client(service.model_name, rank=16, seed=0)
            sampler = await trainer.save_weights_and_get_sampling_client()
            await sampled_per_second(sampler, LOAD, 1, 1)  # warm
            speeds = {at_once: await sampled_per_second(sampler, LOAD, at_once, rounds) for at_once in (1, 8, 32, 64)}
            rows += [
                {"figure": f"sampled tokens/s, {at_once} at once", "value": speed} for at_once, speed in speeds.items()
            ]
            rows.append({"figure": "32 at once against one", "value": speeds[32] / speeds[1]})
            agreed = await agreement(trainer, LOAD)
            figure = f"trained tokens/s (forward and backward, groups of {LOAD.group_size})"
            rows.append({"figure": figure, "value": agreed.trained_per_second})
            rows.append({"figure": "largest |log p sampler - log p trainer|", "value": agreed.largest})
            await client.close("success")
    return pl.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = asyncio.run(measure(options.model, options.threads, options.rounds))
    lines = ["| figure | value |", "| --- | --- |"]
    lines += [f"| {figure} | {value:.4g} |" for figure, value in table.iter_rows()]
    write_result("local_service", "The embedded service", ["\n".join(lines)], table)
