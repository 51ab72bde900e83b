"""The embedded service through the real tinker SDK: how fast it samples and trains, what memory it takes, and whether sampler and
trainer agree. With ``--beside``, the service of another checkout is measured in turn, round by round, with the same client.

    python -m benchmarks local_service --beside FOLDER_OF_A_CHECKOUT

Goals: 32 tokens a second for one request, 250 for 32 at once, 300 for 64; log-probabilities of sampler and trainer for the same tokens
that differ by less than 1e-3 in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import tinker

from benchmarks.local_service.limits import limits
from benchmarks.shared.processes import ROOT
from benchmarks.shared.report import write_result
from benchmarks.shared.service_load import Load, agreement, next_turns_per_second, sampled_per_second
from searchr1_async.local import DEFAULT_MODEL

LOAD = Load()
THIS, BESIDE = "this checkout", "beside it"


_SERVE = """
import asyncio, sys
from pathlib import Path
from searchr1_async.local import local_service
async def main():
    async with local_service(sys.argv[1], folder=Path(sys.argv[2]), dtype="float32") as service:
        print(service.url, service.api_key, service.pid, flush=True)
        await asyncio.to_thread(sys.stdin.read)
asyncio.run(main())
"""


@dataclass(frozen=True)
class Service:
    client: tinker.ServiceClient
    pid: int


@contextmanager
def service(checkout: Path, model: str, folder: Path) -> Iterator[Service]:
    """The service that the code of ``checkout`` starts, in float32."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _SERVE, model, str(folder)],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url, key, pid = process.stdout.readline().split()
        yield Service(tinker.ServiceClient(base_url=url, api_key=key), int(pid))
    finally:
        process.communicate()  # closes its standard input, which ends it


def memory(pid: int) -> dict[str, float]:
    """Of a process, on Linux."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return {}
    sizes = dict(re.findall(r"(Vm\w+):\s+(\d+) kB", status.read_text()))
    return {"memory at the end, MB": int(sizes["VmRSS"]) / 1024, "peak memory, MB": int(sizes["VmHWM"]) / 1024}


async def measure(client: tinker.ServiceClient, model: str) -> dict[str, float]:
    """All speeds of one service, once."""
    trainer = await client.create_lora_training_client(model, rank=16, seed=0)
    sampler = await trainer.save_weights_and_get_sampling_client()
    await sampled_per_second(sampler, LOAD, 1, 1)  # warm
    figures = {
        f"sampled tokens/s, {at_once} at once": await sampled_per_second(sampler, LOAD, at_once, 1)
        for at_once in (1, 3, 8, 32, 64)
    }
    figures["tokens/s of next turns (80 tokens each behind a cached prefix, 16 at once)"] = await next_turns_per_second(
        sampler, LOAD, requests=16, new=80
    )
    agreed = await agreement(trainer, LOAD)
    figures[f"trained tokens/s (forward and backward, groups of {LOAD.group_size})"] = agreed.trained_per_second
    figures["largest |log p sampler - log p trainer|"] = agreed.largest
    await client.close("success")
    return figures


def compare(checkouts: dict[str, Path], model: str, rounds: int) -> pl.DataFrame:
    """One row a figure, checkout and round; the checkouts take turns."""
    rows: list[dict[str, object]] = []
    for number in range(rounds):
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as folder, service(checkout, model, Path(folder)) as one:
                figures = asyncio.run(measure(one.client, model)) | memory(one.pid)
            rows += [
                {"checkout": name, "round": number, "figure": figure, "value": value}
                for figure, value in figures.items()
            ]
            print(f"round {number + 1}, {name}: {figures}", flush=True)
    return pl.DataFrame(rows)


def report(table: pl.DataFrame) -> list[str]:
    """The medians over the rounds, and the ratio of the two checkouts if there are two."""
    medians = table.group_by("figure", "checkout", maintain_order=True).agg(pl.col("value").median())
    wide = medians.pivot("checkout", index="figure", values="value", maintain_order=True)
    names = wide.columns[1:]
    lines = [
        f"| median of {table['round'].n_unique()} rounds | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    lines += [
        f"| {figure} | {' | '.join(f'{value:.4g}' for value in values)} |" for figure, *values in wide.iter_rows()
    ]
    if BESIDE in names:
        ratio = wide.filter(pl.col("figure").str.contains("/s")).select("figure", pl.col(THIS) / pl.col(BESIDE))
        lines += ["", "Times as fast: " + ", ".join(f"{value:.2f} ({figure})" for figure, value in ratio.iter_rows())]
    return ["\n".join(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="folder of another checkout, whose service is measured in turn")
    options = parser.parse_args()
    checkouts = {THIS: ROOT} | ({BESIDE: options.beside.absolute()} if options.beside else {})
    before = limits(options.model)
    table = compare(checkouts, options.model, options.rounds)
    after = limits(options.model)
    write_result("local_service", "The embedded service", [*report(table), *limit_lines(before, after)], table)


def limit_lines(before: dict[str, float], after: dict[str, float]) -> list[str]:
    lines = ["| limits of this machine | before the rounds | after them |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value:.4g} | {after[name]:.4g} |" for name, value in before.items()]
    return ["\n".join(lines)]


if __name__ == "__main__":
    main()
