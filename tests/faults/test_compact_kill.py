"""A process that makes a compact index, killed at any moment and begun again: the files are those of one that nobody killed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from searchr1_async.errors import StoreError
from searchr1_async.search.compact.store import CompactStore
from tests import tiny_world
from tests.faults.compact_child import DIMENSION, PHASES, ROWS
from tests.search.compact.arrays import clustered, contents

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

KILLS = ["rows"] * 7 + ["lists"] * 3 + ["codes"] * 8 + ["exact"] * 3 + ["calibrate"] * 2 + ["checksums"] * 3
"""The phase in which each session is to be killed: the first of a phase for sure, the others may be at the beginning of the next."""
PAUSES = {"rows": 0.03, "lists": 0.6, "codes": 0.08, "exact": 0.05, "calibrate": 0.8, "checksums": 0.05}
"""Seconds between a line and the kill, at most."""
LINES = {"rows": 9, "codes": 5, "exact": 4, "checksums": 4}
"""Lines of the phase before the kill, at most."""
SESSION_SECONDS = 240.0
CHILD = (sys.executable, "-m", "tests.faults.compact_child")


@dataclass
class Session:
    """What one process said, and the phase that it was killed in; None where it came to its end."""

    lines: list[str] = field(default_factory=list)
    phase: str | None = None

    def said(self, word: str) -> list[int]:
        return [int(line.split()[1]) for line in self.lines if line.split()[0] == word]


def begins_after(line: str, phase: str) -> bool:
    """Whether a line says that a phase behind this one begins."""
    return line.startswith("begin ") and PHASES.index(line.split()[1]) > PHASES.index(phase)


def run_session(
    folder: Path, metric: str, phase: str | None, chance: random.Random, *, is_first: bool = False
) -> Session:
    """Runs a process until it has said some lines of the phase, or to its end; the first of a phase does not leave it."""
    session = Session()
    left = chance.randint(1, LINES.get(phase, 1)) if phase else ROWS
    with (folder.parent / "errors.log").open("ab") as errors:
        process = subprocess.Popen(
            [*CHILD, folder, metric, phase or "", "at end" if is_first else ""],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=tiny_world.child_environment() | {"OMP_NUM_THREADS": "2"},
        )
    alarm = threading.Timer(SESSION_SECONDS, process.kill)
    alarm.start()
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            session.lines.append(line.strip())
            left -= phase is not None and phase in line
            if phase is not None and (line.startswith("end ") or begins_after(line, phase)):
                left = 0  # what the phase makes was kept: the process waits
                break
            if phase is not None and left <= 0:
                time.sleep(chance.uniform(0, PAUSES[phase]))
                break
        if left <= 0:
            process.kill()
        session.lines += map(str.strip, stdout)
    code = process.wait()
    alarm.cancel()
    alarm.join()
    assert code == 0 or (code == -9 and left <= 0), (folder.parent / "errors.log").read_text()[-3000:]
    if code:
        begun = [line.split()[1] for line in session.lines if line.startswith("begin ")]
        session.phase = begun[-1] if begun else "start"
    return session


def build_through_kills(folder: Path, metric: str, chance: random.Random) -> Counter[str]:
    """Kills one session after another, then lets one come to its end; counts the phases of the kills.

    Raises:
        AssertionError: something that was on the disk is made again.
    """
    phases: Counter[str] = Counter()
    kept, coded, session = 0, 0, Session()
    for number, phase in enumerate([*KILLS, None]):
        is_first = phase is not None and phase not in KILLS[:number]
        session = run_session(folder, metric, phase, chance, is_first=is_first)
        assert not is_first or session.phase == phase
        assert all(start >= kept for start in session.said("from")), "rows that were kept are asked for again"
        if codes := session.said("codes"):
            assert codes[0] == coded, "codes do not go on from where they were kept"
        if (progress := folder / "building" / "progress.json").exists():
            noted = json.loads(progress.read_bytes())
            kept, coded = max(kept, noted.get("rows", 0)), max(coded, noted.get("codes", 0))
        if session.phase is not None:
            phases[session.phase] += 1
            if not (folder / "manifest.json").exists():
                with pytest.raises(StoreError, match="unfinished compact index"):
                    CompactStore(folder)
    assert session.said("whole") == [ROWS]
    return phases


def without_time(content: bytes) -> dict[str, Any]:
    """A manifest without what differs from run to run."""
    manifest = json.loads(content)
    del manifest["created"]
    for point in manifest["calibration"]["curve"]:
        del point["queries_per_second"]
    return manifest


@pytest.mark.parametrize(("metric", "seed"), [("cosine", 1), ("l2", 2)])
async def test_an_index_killed_at_any_moment_is_that_of_one_that_was_not(
    tmp_path: Path, metric: str, seed: int
) -> None:
    chance = random.Random(seed)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    await anyio.to_thread.run_sync(partial(run_session, alone, metric, None, chance))
    phases = await anyio.to_thread.run_sync(partial(build_through_kills, killed, metric, chance))
    print(f"killed in {dict(phases)}")  # noqa: T201
    assert phases.total() >= 20
    assert set(phases) >= set(PHASES)
    ours, theirs = contents(killed), contents(alone)
    assert ours.keys() == theirs.keys(), "something half written is left"
    assert without_time(ours.pop("manifest.json")) == without_time(theirs.pop("manifest.json"))
    assert [name for name in ours if ours[name] != theirs[name]] == []
    queries = clustered(ROWS, DIMENSION)[:100]
    answers = []
    for folder in (killed, alone):
        store = CompactStore(folder)
        await store.open()
        answers.append(await store.query(queries, 3))
        await store.aclose()
    assert answers[0] == answers[1]
    assert sum(answer[0].id == str(row) for row, answer in enumerate(answers[0])) >= 99, "each finds itself"
