"""The event log: complete lines within a second, repaired after a kill, rate limited."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.events import (
    BatchClosed,
    EpisodeFinished,
    Event,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    RolloutSampled,
    RunEnded,
    RunStarted,
)
from searchr1_async.trackers.tracker import EVENTS_FILE, JsonlTracker, encoded, end_reason, mend, read_events
from tests import tiny_world
from tests.watch import builders

pytestmark = pytest.mark.anyio

STARTED = RunStarted("train", "m", True, "hash")


def sample(episodes: int) -> RolloutSampled:
    return RolloutSampled(episodes, episodes, 0, 0, 1, 0, 0, 0, {}, "nothing", 0.0, 0.0, 0.0, 0.0)


async def test_events_are_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    for session in range(2):
        async with JsonlTracker(path) as log:
            log(STARTED)
            for member in range(50):
                log(EpisodeFinished(builders.episode(builders.question(f"{session}-{member}")), 1))
            log(RunEnded("finished"))
    events = list(read_events(path))
    assert [event.name for event in events[:2]] == ["RunStarted", "EpisodeFinished"]
    ids = [event.values["question_id"] for event in events if event.name == "EpisodeFinished"]
    assert ids == [f"{session}-{member}" for session in range(2) for member in range(50)]
    assert events[-1].values == {"reason": "finished"}


async def test_samples_and_progress_are_rate_limited(tmp_path: Path) -> None:
    now = [100.0]
    path = tmp_path / "events.jsonl"
    async with JsonlTracker(path, clock=lambda: now[0]) as log:
        for tick in range(21):  # ten per second for two seconds
            now[0] = 100.0 + tick / 10
            log(sample(tick))
            log(PhaseAdvanced("evaluate", tick))
            log(BatchClosed(tick, 1))
        log(PhaseEnded("evaluate", 2.0))
    events = list(read_events(path))
    assert [event.values["episodes"] for event in events if event.name == "RolloutSampled"] == [0, 5, 10, 15, 20]
    assert len([event for event in events if event.name == "BatchClosed"]) == 21
    assert [event.values["done"] for event in events if event.name == "PhaseAdvanced"] == [0, 5, 10, 15, 20]


async def test_unwritable_folder_gives_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    log = JsonlTracker(tmp_path / "file" / "events.jsonl")
    async with log:
        log(STARTED)
    assert log.is_dropped
    assert len([record for record in caplog.records if "event log failed" in record.getMessage()]) == 1


@given(st.lists(st.integers(1, 9), max_size=4), st.integers(0, 60), st.booleans())
def test_truncated_file_is_repaired(steps: list[int], kept: int, has_end: bool) -> None:
    """Complete lines are kept, and the next line is complete, wherever the last one was truncated."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        whole = b"".join(encoded(1.0, BatchClosed(step, 1)) for step in steps)
        last = encoded(2.0, BatchClosed(77, 1))
        path.write_bytes(whole + (last if has_end else last[: min(kept, len(last) - 1)]))
        mend(path)
        with path.open("ab") as file:
            file.write(encoded(3.0, BatchClosed(88, 1)))
        found = [event.values["step"] for event in read_events(path)]
        expected = [*steps, 77] if has_end or kept >= len(last) - 1 else steps
        assert found == [*expected, 88]


KILLED = """
import anyio, os, sys
from pathlib import Path
from searchr1_async.events import BatchClosed
from searchr1_async.trackers.tracker import JsonlTracker
from searchr1_async.trackers.tracker import read_events

async def main():
    path = Path(sys.argv[1])
    async with JsonlTracker(path) as log:
        for step in range(10_000):
            log(BatchClosed(step, 1))
            if step % 100 == 0 and sum(1 for _ in read_events(path)) > 100:
                os.kill(os.getpid(), 9)
            await anyio.sleep(0.001)

anyio.run(main)
"""


async def test_killed_process_keeps_written_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    command = [sys.executable, "-c", KILLED, str(path)]
    with anyio.fail_after(60):
        done = await anyio.run_process(command, env=tiny_world.child_environment(), check=False)
    assert done.returncode == -9
    async with JsonlTracker(path) as log:
        log(STARTED)
    steps = [event.values["step"] for event in read_events(path) if event.name == "BatchClosed"]
    assert len(steps) > 100
    assert steps == list(range(len(steps)))
    assert list(read_events(path))[-1].name == "RunStarted"


@pytest.mark.parametrize(
    ("events", "torn", "reason"),
    [
        ([], b"", None),
        ([STARTED, RunEnded("finished")], b"", "finished"),
        ([STARTED, RunEnded("failed"), Notice("late")], b'{"time": 3, "ev', "failed"),
        ([RunEnded("stopped"), STARTED, Notice("killed after it")], b"", None),
    ],
)
def test_a_log_says_why_its_last_session_ended(
    tmp_path: Path, events: list[Event], torn: bytes, reason: str | None
) -> None:
    path = tmp_path / EVENTS_FILE
    path.write_bytes(b"".join(encoded(1.0, event) for event in events) + torn)
    assert end_reason(path) == reason
    assert end_reason(tmp_path / "no such log") is None
