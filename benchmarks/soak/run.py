"""The whole engine for a long time under faults: flat memory, no hang, every group accounted for.

    python -m benchmarks soak --minutes 30

Trains with ``max_staleness=1`` and refill groups on the embedded service with a scripted model, behind a proxy that breaks requests
(``breaking_proxy.py``), with a local Chroma and a Gemini stand-in that fails too. Service, proxy and stand-in run in their own
processes: the memory measured is the engine's. At the end of every step the groups in the run's folder are counted: started = trained
on + dropped with a reason + open in the resume point.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import polars as pl

import searchr1_async as sr
from benchmarks.shared.gemini_stand_in import counts_of as gemini_counts
from benchmarks.shared.gemini_stand_in import stand_in_process
from benchmarks.shared.report import write_result
from benchmarks.shared.stand_in_settings import Fault, StandInSettings
from benchmarks.soak.breaking_proxy import counts_of as proxy_counts
from benchmarks.soak.breaking_proxy import proxy_process
from searchr1_async.events import EpisodeFinished, Event, GroupDropped, GroupFinished, StepFinished
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world
from tests.faults import scripted_world

WARM_UP_MINUTES = 5.0
"""In which caches fill and libraries are loaded: memory is judged after them."""
MAX_SILENCE = 120.0
"""Seconds without any episode's end that count as a hang."""
MAX_GROWTH = 0.05
"""Of the memory after the warm-up that it may have grown by in the end."""
SAMPLE_SECONDS = 2.0
GROUPS, GROUP_SIZE = 24, 8
TINKER_FAULTS = 0.05
GEMINI_FAULTS = {
    Fault.TOO_MANY: 0.02,
    Fault.TOO_MANY_SILENT: 0.01,
    Fault.INTERNAL: 0.015,
    Fault.UNAVAILABLE: 0.015,
    Fault.RESET: 0.015,
    Fault.BROKEN_JSON: 0.01,
    Fault.ONE_FEWER: 0.005,
    Fault.EMPTY: 0.005,
}
SETTINGS: dict[str, Any] = scripted_world.SETTINGS | {
    "group_size": GROUP_SIZE,
    "groups_per_batch": GROUPS,
    "minibatches": 4,
    "max_staleness": 1,
    "refill_groups": 4,
    "first_turn": "auto",
    "epochs": 1_000_000,
    "checkpoint_every": 1_000,
}


@dataclass
class Watch:
    """What was seen, by events and by the clock."""

    run: Path
    began: float = field(default_factory=time.monotonic)
    episodes: int = 0
    failed: int = 0
    finished: int = 0
    """Groups, by events."""
    dropped: Counter[str] = field(default_factory=Counter)
    step: int = 0
    steps_checked: int = 0
    last_episode: float = field(default_factory=time.monotonic)
    longest_silence: float = 0.0
    longest_lag: float = 0.0
    samples: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        match event:
            case EpisodeFinished():
                now = time.monotonic()
                self.longest_silence = max(self.longest_silence, now - self.last_episode)
                self.episodes, self.last_episode = self.episodes + 1, now
                self.failed += event.episode.failed
            case GroupFinished():
                self.finished += 1
            case GroupDropped():
                self.dropped[event.reason] += 1
            case StepFinished():
                self.step = event.step

    async def sample(self) -> None:
        """Memory and the like, now and then; ends the run where nothing happens.

        Raises:
            RuntimeError: no episode has ended for :data:`MAX_SILENCE` seconds.
        """
        while True:
            before = time.monotonic()
            await anyio.sleep(SAMPLE_SECONDS)
            now = time.monotonic()
            self.longest_lag = max(self.longest_lag, now - before - SAMPLE_SECONDS)
            if now - self.last_episode > MAX_SILENCE:
                raise RuntimeError(f"no episode has ended for {now - self.last_episode:.0f} s, after {self.episodes}")
            self.samples.append(
                {
                    "seconds": now - self.began,
                    "rss_mb": _rss_mb(),
                    "tasks": float(len(asyncio.all_tasks())),
                    "threads": float(threading.active_count()),
                    "open_files": float(_open_files()),
                    "episodes": float(self.episodes),
                    "groups": float(self.finished),
                    "steps": float(self.step),
                }
            )

    async def check_steps(self) -> None:
        """Counts the groups on disk after every step, each time one is written."""
        while True:
            await anyio.sleep(SAMPLE_SECONDS)
            if self.step > self.steps_checked:
                step = await anyio.to_thread.run_sync(lambda: account(self.run)["step"])
                self.steps_checked = int(step)


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def account(run: Path) -> dict[str, int]:
    """Counts a run's groups on disk, while it goes on or afterwards.

    Raises:
        AssertionError: a place is in two steps, in a step and open, or nowhere.
    """
    # The resume point first: what is recorded after it may be there already, and is left out by its step.
    point = ResumePoint.load(run)
    assert point is not None
    groups = RunRecords(run).groups().filter(pl.col("step") <= point.step).collect()
    recorded = groups["place"].to_list()
    assert len(recorded) == len(set(recorded)), "a group is in two steps"
    started = set(range(point.next_place))
    assert not set(recorded) & set(point.open_places), "a group is in a step and open"
    assert started == set(recorded) | set(point.open_places), "a group is nowhere, or was never started"
    assert groups.filter(pl.col("trained") == pl.col("drop_reason").is_not_null()).is_empty()
    trained = int(groups["trained"].sum())
    return {
        "step": point.step,
        "started": point.next_place,
        "trained": trained,
        "dropped": groups.height - trained,
        "open": len(point.open_places),
    }


@asynccontextmanager
async def _world(folder: Path) -> AsyncIterator[tuple[str, str, sr.Search, dict[str, Any]]]:
    """The way to the service (and its tokenizer), the search, and what counts the faults."""
    settings = StandInSettings(fault_rates=GEMINI_FAULTS, retry_after=0.2, says_when="details", latency=0.02, seed=1)
    async with (
        scripted_world.service(folder, "tests.faults.script:slow_reply") as service,
        proxy_process(service.url, TINKER_FAULTS, seed=1) as url,
        stand_in_process(settings) as gemini,
    ):
        os.environ["TINKER_API_KEY"] = service.api_key
        search = scripted_world.make_search(
            folder / "index",
            embedder=sr.search.GeminiEmbedder(api_key="a-key-of-no-service", base_url=gemini),
            pacing=sr.search.PacingSettings(first_pause=0.05, longest_pause=1.0, request_timeout=5.0),
            cache_entries=1_000,
        )
        yield url, service.tokenizer_path, search, {"proxy": url, "gemini": gemini}


async def run(minutes: float) -> None:
    """Trains for so long, watches, checks, and writes the result."""
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = Path(scratch)
        async with _world(folder) as (url, tokenizer, search, counting):
            watch = Watch(folder / "run")
            reason = await _train(watch, search, url, tokenizer, minutes)
            faults = {
                **{f"Tinker {name}": count for name, count in (await proxy_counts(counting["proxy"])).items()},
                **{
                    f"Gemini {name}": count
                    for name, count in (await gemini_counts(counting["gemini"]))["faults"].items()
                },
            }
            counts = account(watch.run)
            check_events(watch, counts)
            assert reason == "time_limit", reason
            _report(watch, counts, faults, search.statistics.failed, minutes)


async def _train(watch: Watch, search: sr.Search, url: str, tokenizer: str, minutes: float) -> str:
    """Trains under watch; why it ended."""
    reason = ""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch.sample)
        tasks.start_soon(watch.check_steps)
        result = await sr.train(
            scripted_world.questions(),
            search,
            out_dir=watch.run,
            service=url,
            reward=scripted_world.reward,
            on_event=watch,
            **tiny_world.given(
                sr.TrainConfig, SETTINGS, model="scripted", tokenizer=tokenizer, time_limit=60 * minutes
            ),
        )
        reason = result.reason
        tasks.cancel_scope.cancel()
    return reason


def check_events(watch: Watch, counts: dict[str, int]) -> None:
    """Holds the events against the records.

    Raises:
        AssertionError: a group ended and is nowhere, or is recorded and never ended.
    """
    groups = RunRecords(watch.run).groups().collect()
    reasons = Counter(groups.filter(~pl.col("trained"))["drop_reason"].to_list())
    assert watch.finished >= groups.height, "a group is recorded that never ended"
    ended_and_open = watch.finished - groups.height
    assert ended_and_open <= counts["open"], "more groups ended than the records and the open places hold"
    for reason, count in reasons.items():
        assert watch.dropped[reason] >= count, f"{reason}: {count} recorded, {watch.dropped[reason]} reported"
    assert watch.episodes >= watch.finished * GROUP_SIZE
    rows = RunRecords(watch.run).episodes().select(pl.len()).collect().item()
    assert rows == int((groups["members"] + groups["failed"]).sum()), "an episode is missing, or doubled"


def by_minute(watch: Watch) -> pl.DataFrame:
    """The samples of each minute as one row; the counts are those at its end."""
    return (
        pl.DataFrame(watch.samples)
        .with_columns((pl.col("seconds") // 60).cast(pl.Int64).alias("minute"))
        .group_by("minute", maintain_order=True)
        .agg(
            pl.col("rss_mb").median().round(1),
            pl.col("rss_mb").max().round(1).alias("rss_mb_max"),
            *(pl.col(name).max().cast(pl.Int64) for name in ("tasks", "threads", "open_files")),
            *(pl.col(name).last().cast(pl.Int64) for name in ("episodes", "groups", "steps")),
        )
    )


def memory(watch: Watch, minutes: float) -> tuple[float, float, float]:
    """MB after the warm-up and at the end (medians of a tenth of the time each), and the slope between in MB an hour."""
    table = pl.DataFrame(watch.samples)
    warm = table.filter(pl.col("seconds") > 60 * min(WARM_UP_MINUTES, minutes / 3))
    tenth = max(1, warm.height // 10)
    slope = np.polyfit(warm["seconds"].to_numpy() / 3600, warm["rss_mb"].to_numpy(), 1)[0]
    return float(np.median(warm["rss_mb"][:tenth])), float(np.median(warm["rss_mb"][-tenth:])), float(slope)


def _report(watch: Watch, counts: dict[str, int], faults: dict[str, int], failed_searches: int, minutes: float) -> None:
    table = by_minute(watch)
    first, last, slope = memory(watch, minutes)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * table.width]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.iter_rows()]
    requests = faults.pop("Tinker requests")
    broken = ", ".join(f"{name} {count}" for name, count in sorted(faults.items()))
    write_result(
        "soak",
        f"{minutes:g} minutes under faults",
        [
            f"**Groups**: {counts['started']:,} started = {counts['trained']:,} trained on + {counts['dropped']:,} dropped with a "
            f"reason + {counts['open']:,} open at the last resume point; held after {counts['step']:,} steps, checked while the run "
            f"went on up to step {watch.steps_checked:,}, against the events and the records. "
            f"{watch.episodes:,} episodes ended, {watch.failed:,} of them failed by the service; {failed_searches} searches failed.",
            f"**Memory** of the engine's process: {first:.1f} MB after the warm-up, {last:.1f} MB at the end, {slope:+.1f} MB an hour "
            "between by least squares.",
            f"**No hang**: the longest time without an episode's end was {watch.longest_silence:.1f} s; the event loop was "
            f"{1000 * watch.longest_lag:.0f} ms late at most when it was asked every {SAMPLE_SECONDS:g} s.",
            f"**Faults**: {TINKER_FAULTS:.0%} of the requests to Tinker ({requests:,} in all), "
            f"{sum(GEMINI_FAULTS.values()):.1%} of those to Gemini. {broken}.",
            "\n".join(lines),
        ],
        table,
    )
    if minutes > 2 * WARM_UP_MINUTES:
        assert last <= first * (1 + MAX_GROWTH), f"memory grew from {first:.1f} to {last:.1f} MB"
    assert watch.steps_checked > 0, "no step was checked while the run went on"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    anyio.run(run, arguments.minutes)
