"""The search at scale: 1,024 episodes over 100,000 passages, against the way of tinker-cookbook's recipe.

    python -m benchmarks search --data FOLDER --work FOLDER

A real `chroma run` holds the passages, the real google-genai client embeds with a stand-in for Gemini
(benchmarks/shared/gemini_stand_in.py), and each way of searching runs the same seeded load in a fresh process, against a fresh
stand-in. Sampling is replaced by a pause. `--data` holds real transcripts (`search_r1_traces.jsonl.gz`) and passages
(`corpus.parquet`); without it similar ones are made. `--work` keeps the index, which takes minutes to build.

Goals, against the recipe's way: at most 1/20 of its requests, at most 1/8 of its client CPU per search, a p99 latency no worse with 4
episodes at once, and at least 5 times better with 1,024.

The ratio of requests depends on how long 1,024 episodes stay in flight: towards the end of a wave few are left, and their searches go
out alone. So one wave is measured, and three of them in a row.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.search.load import Subject, made_data, make_load, real_passages, real_subjects
from benchmarks.shared.chroma_index import build_index, chroma_server, nearest
from benchmarks.shared.gemini_stand_in import Fault, StandInSettings, stand_in_process
from benchmarks.shared.processes import child_environment, command_of
from benchmarks.shared.report import write_result

GROUP_SIZE = 8
SERVICE = StandInSettings(latency=0.2, latency_per_text=0.001, jitter=0.2)
FAULTS = {
    Fault.TOO_MANY: 0.02,
    Fault.TOO_MANY_SILENT: 0.01,
    Fault.INTERNAL: 0.02,
    Fault.UNAVAILABLE: 0.02,
    Fault.RESET: 0.015,
    Fault.CUT_SHORT: 0.005,
    Fault.BROKEN_JSON: 0.005,
    Fault.SLOW: 0.005,
}
"""One request in ten meets one. A slow answer comes after 15 s."""
QUOTA = 5.0
"""Requests a second; a tenth of the 3,000 a minute of a paid Gemini key, as when ten runs share it. On two cores the recipe's
way sends about 50, so that the whole quota would not be met."""
WAYS = ("recipe", "ours", "none")
ASKED = (
    ("low", "p99", "p99 latency", 1),
    ("high", "p99", "p99 latency", 5),
    ("high", "cpu_ms_a_search", "client CPU a search", 8),
    ("high", "requests", "requests in all", 20),
    ("high", "embedding_requests", "embedding requests", 20),
    ("steady", "requests", "requests in all", 20),
    ("steady", "embedding_requests", "embedding requests", 20),
)
"""Scenario, figure, what it is, and by what factor ours is to be better."""


@dataclass(frozen=True)
class Scenario:
    """A load and how the embedding service behaves under it.

    Args:
        title: for the table.
        groups: of eight episodes.
        at_once: episodes in flight.
        pause_scale: 1 means pauses of about 2 s.
        service: the stand-in.
        vertex: its Vertex AI face, one text a request.
    """

    title: str
    groups: int
    at_once: int
    pause_scale: float
    service: StandInSettings = field(default_factory=lambda: SERVICE)
    vertex: bool = False


SCENARIOS = {
    "low": Scenario("4 episodes at once", 16, 4, 0.1),
    "high": Scenario("1,024 episodes at once", 128, 1024, 0.5),
    "steady": Scenario("1,024 at once, three times as many in all", 384, 1024, 0.5),
    "vertex": Scenario("1,024 at once, Vertex AI (one text a request)", 128, 1024, 0.5, vertex=True),
    "faults": Scenario(
        f"256 at once, {QUOTA:g} requests/s allowed, 10 % faults",
        32,
        256,
        0.5,
        dataclasses.replace(SERVICE, requests_per_second=QUOTA, fault_rates=FAULTS, slow_seconds=15.0, seed=1),
    ),
}


def make_data(data: Path | None, passages: int) -> tuple[list[Subject], pl.DataFrame]:
    """Real ones where there is a folder of them, else made ones."""
    if data is not None:
        return real_subjects(data), real_passages(data, passages)
    return made_data(max(scenario.groups for scenario in SCENARIOS.values()), passages, seed=0)


async def play(scenario: Scenario, way: str, load: Path, chroma: int) -> dict[str, Any]:
    """One way's row of one scenario.

    Raises:
        RuntimeError: its process failed; its output is above.
    """
    async with stand_in_process(scenario.service) as gemini:
        process = await asyncio.create_subprocess_exec(
            *command_of("benchmarks.search.contender", way, str(load), "--gemini", gemini, "--chroma", str(chroma)),
            *(["--vertex"] if scenario.vertex else []),
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
        )
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode:
        raise RuntimeError(f"{way!r} failed in {scenario.title!r}")
    return json.loads(output)


async def measure(
    names: Sequence[str], subjects: Sequence[Subject], work: Path, chroma: int, seed: int
) -> list[dict[str, Any]]:
    """All rows of the scenarios."""
    rows = []
    for name in names:
        scenario = SCENARIOS[name]
        load = make_load(
            subjects,
            groups=scenario.groups,
            group_size=GROUP_SIZE,
            at_once=scenario.at_once,
            pause_scale=scenario.pause_scale,
            seed=seed,
        )
        load = dataclasses.replace(load, right=await nearest(chroma, list(dict.fromkeys(load.queries))))
        path = work / f"load-{name}.json"
        load.save(path)
        played = {way: await play(scenario, way, path, chroma) for way in WAYS}
        for way, row in played.items():
            own_cpu = row["client_cpu_seconds"] - played["none"]["client_cpu_seconds"]
            row |= {"scenario": name, "title": scenario.title, "repeated": load.repeated, "seed": seed}
            row["cpu_ms_a_search"] = 1000 * own_cpu / row["searches"]
            row["requests"] = row["embedding_requests"] + row["store_requests"]
            row["searches_a_second"] = row["searches"] / row["seconds"]
            if way != "none":
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


# --- the report -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a scenario and way."""
    lines = [
        "| load | way | searches | right | embedding requests | texts embedded (again) | store requests | cache hits "
        "| client CPU a search | p50 | p90 | p99 | searches/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['title']} | {row['way']} | {row['searches']:,} | {row['right']:,} | {row['embedding_requests']:,} "
            f"| {row['texts_embedded']:,} ({row['embedded_again']:,}) | {row['store_requests']:,} | {row['cache_hits']:,} "
            f"| {row['cpu_ms_a_search']:.2f} ms | {row['p50']:.2f} s | {row['p90']:.2f} s | {row['p99']:.2f} s "
            f"| {row['searches_a_second']:.0f} |"
        )
    return "\n".join(lines)


def asked(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was asked of ours, and whether it holds."""
    by = {(row["scenario"], row["way"]): row for row in rows}

    def ratio(scenario: str, figure: str) -> float:
        return by[scenario, "recipe"][figure] / max(by[scenario, "ours"][figure], 1e-9)

    figures = [
        (f"{what}, {SCENARIOS[scenario].title}", ratio(scenario, figure), least)
        for scenario, figure, what, least in ASKED
    ]
    lines = ["| the recipe's over ours | at least | measured | holds |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {what} | {least} | {is_:.3g} | {'yes' if is_ >= least else 'NO'} |" for what, is_, least in figures]
    return "\n".join(lines)


def notes(rows: Sequence[Mapping[str, Any]], passages: int, is_real: bool) -> str:
    """How it was measured, and what else is to be known of the rows."""
    lines = [
        f"- {passages:,} passages of 768 dimensions in a `chroma run` process with Chroma's own index settings; queries and "
        f"passages are {'real' if is_real else 'made'}. Of the searches of a load, "
        f"{min(row['repeated'] for row in rows):.0%} to {max(row['repeated'] for row in rows):.0%} repeat an earlier query.",
        f"- The embedding service answers after {SERVICE.latency:g} s and {SERVICE.latency_per_text * 1000:g} ms a text, "
        f"± {SERVICE.jitter:.0%}. Server, stand-in and client share the machine's cores.",
        "- Client CPU is the CPU time of the client's process, minus that of the same episodes without search.",
        "- Right are the searches with the same passages as by one plain query. Latencies are those of all searches.",
        "- The recipe's way sends one `get_collection` and one `query` a search to the store, which count as two requests.",
    ]
    for row in rows:
        if row["faults_met"] or row["failures"] or row["right"] < row["searches"]:
            statuses = ", ".join(f"{status}: {count:,}" for status, count in sorted(row["embedding_statuses"].items()))
            lines.append(
                f"- {row['title']}, {row['way']}: {row['faults_met']} requests met a fault, answers by status {statuses}; "
                f"{row['searches'] - row['right']} searches did not end right"
                + "".join(f", {count} by {kind}" for kind, count in row["failures"].items())
                + f"; {row['seconds']:.0f} s in all."
            )
    return "\n".join(lines)


async def run(options: argparse.Namespace, work: Path) -> None:
    subjects, passages = make_data(options.data, options.passages)
    index = work / f"chroma-{'real' if options.data else 'made'}-{options.passages}"
    await asyncio.to_thread(build_index, index, passages)
    async with chroma_server(index) as chroma:
        rows = await measure(options.scenarios, subjects, work, chroma, options.seed)
    body = [table(rows), notes(rows, options.passages, options.data is not None)]
    if set(options.scenarios) == set(SCENARIOS):
        frame = pl.DataFrame(
            [{**row, "failures": sum(row["failures"].values()), "embedding_statuses": None} for row in rows]
        ).drop("embedding_statuses")
        write_result("search", "The search at scale", [body[0], asked(rows), body[1]], frame)
    else:
        print("\n\n".join(body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of real transcripts and passages")
    parser.add_argument("--work", type=Path, help="where the index is kept; a folder for this once by default")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as once:
        work = options.work or Path(once)
        work.mkdir(parents=True, exist_ok=True)
        asyncio.run(run(options, work))
