"""What every kept result says of itself: when, where and by which command it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import polars as pl

from benchmarks.shared.processes import ROOT

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or ROOT / "benchmarks" / "results").absolute()
"""Where results are kept; `BENCHMARK_RESULTS` names another folder, for a run that only tries something."""


def provenance() -> str:
    """Date, machine, revision, versions and command, as Markdown lines."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("tinker", "torch", "transformers", "chromadb"))
    arguments = " ".join(shlex.quote(a) for a in sys.argv[1:])
    return "\n".join(
        [
            f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
            f"- machine: {os.cpu_count()} cores, {cpu}, Python {platform.python_version()}",
            f"- versions: {packages}",
            f"- revision: {revision or 'unknown'}",
            f"- command: `{f'{sys.argv[0]} {arguments}'.strip()}`",
        ]
    )


class Goal(NamedTuple):
    """What was asked, and what was measured."""

    what: str
    size: str
    measured: str
    holds: bool


def goals_table(goals: Iterable[Goal]) -> str:
    """One line a goal."""
    lines = ["| asked | size | measured | holds |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {goal.what} | {goal.size} | {goal.measured} | {'yes' if goal.holds else 'NO'} |" for goal in goals]
    return "\n".join(lines)


def write_result(name: str, title: str, body: Sequence[str], table: pl.DataFrame) -> Path:
    """Writes ``results/<name>.md`` and the table behind it as ``results/<name>.parquet``; returns the first."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    table.write_parquet(RESULTS / f"{name}.parquet")
    path = RESULTS / f"{name}.md"
    path.write_text("\n\n".join([f"# {title}", provenance(), *body]) + "\n")
    print(path.read_text())
    return path
