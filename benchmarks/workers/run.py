"""Rollout workers: samples per second of one process and of worker processes, where the client is the limit.

    python -m benchmarks workers

Goal: two workers give at least 1.6 times the samples per second of one process. Groups of 8 run whole (rendering, sampling, reading,
searching) with the real SDK against a service that costs as little CPU as possible (``service.py``), since it shares the machine.
The arms take turns within one run, and each round gives one ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import polars as pl
import tinker
from transformers import AutoTokenizer

from benchmarks.shared.processes import child_environment, command_of
from benchmarks.shared.report import write_result
from searchr1_async import Episode, Passage, Question
from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.formats import make_dialect
from searchr1_async.local import DEFAULT_MODEL, Scripted, local_service
from searchr1_async.local.model_files import resolve_model
from searchr1_async.rollout.event_loop import Pulse
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.messages import WorkerSpec
from searchr1_async.rollout.player import GroupPlayer, GroupTask, LocalPlayer, TinkerPolicy
from searchr1_async.rollout.worker_pool import WorkerPool

MODEL = "canned"
GROUP_SIZE = 8
INSTRUCTIONS = "Answer the question with the help of the search tool. " * 40
"""Makes prompts of about 500 tokens, as the recipe's are."""
LIMITS = EpisodeLimits(max_turns=5, max_tokens=256, max_trajectory_tokens=8192)
SECONDS_A_SAMPLE = 0.5
KEY = "tml-benchmark"


PASSAGES = tuple(
    Passage(str(number), f"Title {number}", "The river rises in the mountains and ends in the sea. " * 9)
    for number in range(3)
)


async def instant_search(queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
    """Three passages of a hundred words, at once: what a cache would answer."""
    return tuple(PASSAGES for _ in queries)


def canned_reply(prompt: list[int], chance: object) -> str:
    """The same replies from the embedded service, for its CPU a sample."""
    from benchmarks.workers.service import REPLIES

    return REPLIES[getattr(chance, "randrange")(3)]  # noqa: B009


@dataclass(frozen=True)
class Measured:
    """One arm of one round."""

    arm: str
    round: int
    samples: int
    seconds: float
    samples_a_second: float
    client_cpu_ms: float
    """Of this process and its workers, a sample."""
    parent_cpu_ms: float
    """Of this process alone."""
    service_cpu_ms: float
    parent_lag_p99_ms: float
    parent_lag_max_ms: float


def cpu_of(pids: Sequence[int]) -> float:
    """Seconds of CPU that processes have taken."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def play_all(player: GroupPlayer, policy: TinkerPolicy, groups: int, at_once: int, offset: int) -> int:
    """Plays groups, so many at a time; returns the samples, of which there is one a turn."""
    samples = 0
    waiting = iter(range(groups))

    async def finished(member: int, episode: Episode) -> None:
        nonlocal samples
        assert episode.is_complete, episode.error
        samples += len(episode.turns)

    async def one_after_another() -> None:
        for number in waiting:
            question = Question(str(number), f"Which river is the longest of those of country {number}?", ("yes",))
            await player.play(GroupTask(offset + number, question, tuple(range(GROUP_SIZE)), None), policy, finished)

    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(one_after_another)
    return samples


async def measure(
    arm: str, number: int, player: GroupPlayer, policy: TinkerPolicy, service: int, workers: Sequence[int], scale: float
) -> Measured:
    groups, at_once = round(96 * scale), 64
    before = cpu_of([service]), cpu_of(workers), time.process_time()
    async with Pulse() as pulse:
        began = time.monotonic()
        samples = await play_all(player, policy, groups, at_once, number * 10_000)
        seconds = time.monotonic() - began
        lag = pulse.take()
    after = cpu_of([service]), cpu_of(workers), time.process_time()
    served, worked, led = (1000 * (late - early) / samples for early, late in zip(before, after, strict=True))
    measured = Measured(
        arm,
        number,
        samples,
        seconds,
        samples / seconds,
        worked + led,
        led,
        served,
        1000 * lag.lag_p99,
        1000 * lag.lag_max,
    )
    print(measured, flush=True)
    return measured


@asynccontextmanager
async def canned_service(tokenizer: Path) -> AsyncIterator[tuple[str, int]]:
    """URL and process id."""
    command = command_of("benchmarks.workers.service", str(tokenizer), str(SECONDS_A_SAMPLE))
    async with await anyio.open_process(command, stderr=None, env=child_environment()) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(await process.stdout.receive())}", process.pid
        finally:
            process.kill()


@asynccontextmanager
async def policy_of(url: str, key: str) -> AsyncIterator[TinkerPolicy]:
    client = tinker.ServiceClient(base_url=url, api_key=key)
    await anyio.to_thread.run_sync(lambda: client.holder)
    try:
        sampler = await client.create_sampling_client(base_model=MODEL)
        yield TinkerPolicy(sampler, 0, SamplingSettings())
    finally:
        await client.close("success")


def local_player(tokenizer: object, first_turn: str) -> LocalPlayer:
    dialect = make_dialect("tags", MODEL, tokenizer, instructions=INSTRUCTIONS)
    return LocalPlayer(dialect, instant_search, LIMITS, SampleGate(), first_turn)  # type: ignore[arg-type]


def spec_of(tokenizer: Path, first_turn: str) -> WorkerSpec:
    return WorkerSpec("tags", MODEL, str(tokenizer), LIMITS, None, INSTRUCTIONS, first_turn)  # type: ignore[arg-type]


async def run_arms(tokenizer: object, folder: Path, rounds: int, scale: float, first_turn: str) -> list[Measured]:
    """All arms in turn, a round after another, over one service; a short round first is not counted."""
    measured = []
    local = local_player(tokenizer, first_turn)
    spec = spec_of(folder, first_turn)
    async with (
        canned_service(folder) as (url, service),
        policy_of(url, KEY) as policy,
        WorkerPool(spec, instant_search, count=1) as one,
        WorkerPool(spec, instant_search, count=2) as two,
    ):
        arms: list[tuple[str, GroupPlayer, list[int]]] = [
            ("in process", local, []),
            ("1 worker", one, [worker.pid for worker in one.statistics.workers]),
            ("2 workers", two, [worker.pid for worker in two.statistics.workers]),
        ]
        for number in range(rounds + 1):
            for name, player, pids in arms:
                result = await measure(name, number, player, policy, service, pids, scale if number else scale / 4)
                if number:
                    measured.append(result)
    return measured


async def embedded_cost(tokenizer: object, folder: Path, scratch: Path, scale: float) -> float:
    """Milliseconds of CPU a sample of the embedded service with its scripted model."""
    script = Scripted(
        "benchmarks.workers.run:canned_reply", latency={"floor": SECONDS_A_SAMPLE}, tokenizer_path=str(folder)
    )
    async with (
        local_service(MODEL, folder=scratch, threads=1, scripted=script) as service,
        policy_of(service.url, service.api_key) as policy,
    ):
        player = local_player(tokenizer, "split")
        await play_all(player, policy, 8, 8, 0)
        return (await measure("embedded service", 0, player, policy, service.pid, [], scale / 2)).service_cpu_ms


def body_of(table: pl.DataFrame, embedded: float, load: float) -> list[str]:
    medians = table.group_by("arm", maintain_order=True).agg(pl.exclude("round").median())
    rows = {row["arm"]: row for row in medians.iter_rows(named=True)}
    by_round = table.pivot("arm", index="round", values="samples_a_second")
    ratios = (by_round["2 workers"] / by_round["in process"]).to_list()
    single = (by_round["2 workers"] / by_round["1 worker"]).to_list()
    base, two = rows["in process"], rows["2 workers"]
    client, service = base["client_cpu_ms"], base["service_cpu_ms"]
    ceiling = (os.cpu_count() or 1) / (1 + service / client)
    lines = [
        "| arm | samples/s | client CPU ms a sample | of which this process | service CPU ms a sample | lag p99 ms | lag max ms |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    lines += [
        f"| {name} | {row['samples_a_second']:.0f} | {row['client_cpu_ms']:.2f} | {row['parent_cpu_ms']:.2f} | "
        f"{row['service_cpu_ms']:.2f} | {row['parent_lag_p99_ms']:.1f} | {row['parent_lag_max_ms']:.1f} |"
        for name, row in rows.items()
    ]
    ratio = statistics.median(ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds"
    return [
        "Groups of 8 played whole through the real SDK: prompts of about 500 tokens, two searches on average, one request a "
        f"sample (split first turns), 64 groups at once, {SECONDS_A_SAMPLE:g} s a sample at the service. Medians over rounds in "
        "which the arms took turns.",
        "\n".join(lines),
        f"Load average of the machine when it began: {load:.1f} (on a quiet one under 1).",
        f"**2 workers / in process: {ratio:.2f}** ({spread}; asked: at least 1.6); "
        f"2 workers / 1 worker: {statistics.median(single):.2f}.",
        f"The service is canned: raw HTTP over asyncio, answers encoded beforehand, {service:.2f} ms of CPU a sample; the "
        f"embedded service with its scripted model takes {embedded:.2f} ms, {embedded / client:.0%} of the client's "
        f"{client:.2f} ms, and so would have been the limit beside two clients. Client and service share "
        f"{os.cpu_count()} cores, so the ceiling of any number of workers is {os.cpu_count()} / (1 + {service:.2f} / "
        f"{client:.2f}) = {ceiling:.2f} times one saturated core; with what the parent of two workers takes (searches, "
        f"episodes received) it is {(os.cpu_count() or 1) * client / (two['client_cpu_ms'] + two['service_cpu_ms']):.2f}.",
    ]


async def run(rounds: int, scale: float, first_turn: str) -> None:
    load = os.getloadavg()[0]
    folder = resolve_model(DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        embedded = await embedded_cost(tokenizer, folder, Path(scratch), scale)
    table = pl.DataFrame([asdict(m) for m in await run_arms(tokenizer, folder, rounds, scale, first_turn)])
    write_result("workers", "Rollout workers where the client is the limit", body_of(table, embedded, load), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of groups")
    parser.add_argument("--first-turn", default="split", choices=("split", "shared"))
    arguments = parser.parse_args()
    asyncio.run(run(arguments.rounds, arguments.scale, arguments.first_turn))
