"""Service trackers, read back from their own formats; skipped if not installed."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from searchr1_async.events import (
    EpisodeFinished,
    EvaluationFinished,
    Event,
    Notice,
    RunEnded,
    RunStarted,
    StepFinished,
)
from searchr1_async.trackers import StepTracker
from searchr1_async.trackers.tracker import Tracker
from tests.watch import builders

pytestmark = pytest.mark.anyio


def a_run(out_dir: Path, first: int = 1, last: int = 3) -> list[Event]:
    settings = {"learning_rate": 1e-3, "search": {"n_results": 3}}
    events: list[Event] = [
        RunStarted("train", "the/model", True, "hash", out_dir=str(out_dir), step=first - 1, settings=settings)
    ]
    for step in range(first, last + 1):
        asked = builders.question(builders.HOSTILE)
        events += [EpisodeFinished(builders.episode(asked), step) for _ in range(6)]
        events.append(StepFinished(step, {"env/all/reward/total": step / 10, "nothing": math.nan}))
    numbers = {"exact_match": 0.5, "exact_match_low": 0.4, "exact_match/atlas": 0.25}
    events += [EvaluationFinished("after RL", last, numbers), Notice(builders.HOSTILE, is_warning=True)]
    return [*events, Notice("no warning"), RunEnded("finished")]


async def play(tracker: Tracker, events: Sequence[Event]) -> None:
    async with tracker:
        for event in events:
            tracker(event)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


class Steps(StepTracker):
    """Records the hooks' arguments."""

    name = "steps"

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[int, dict[str, float]]] = []
        self.warnings: list[str] = []
        self.begun: list[int] = []

    def begin(self, started: RunStarted) -> None:
        self.begun.append(started.step)

    def log_numbers(self, step: int, numbers: Any, moment: float) -> None:
        self.numbers.append((step, dict(numbers)))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


async def test_logged_numbers_and_warnings(tmp_path: Path) -> None:
    steps = Steps()
    await play(steps, a_run(tmp_path, last=5))
    assert steps.begun == [0]
    assert steps.numbers[:2] == [(1, {"env/all/reward/total": 0.1}), (2, {"env/all/reward/total": 0.2})]
    assert steps.numbers[-1] == (
        5,
        {"evaluation/exact_match": 0.5, "evaluation/exact_match_low": 0.4, "evaluation/exact_match/atlas": 0.25},
    )
    assert len(steps.warnings) == 1
    assert steps.warnings[0].isprintable()


@pytest.mark.slow
async def test_tensorboard_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from searchr1_async.trackers import TensorBoardTracker

    await play(TensorBoardTracker(), a_run(tmp_path))
    await play(TensorBoardTracker(), a_run(tmp_path, first=3, last=4))  # resumed after step 2: step 3 is redone
    read = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rewards = [(point.step, round(point.value, 4)) for point in read.Scalars("env/all/reward/total")]
    assert rewards == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert "nothing" not in read.Tags()["scalars"]
    assert {"evaluation/exact_match", "evaluation/exact_match/atlas"} <= set(read.Tags()["scalars"])
    texts = [tag for tag in read.Tags()["tensors"] if "text" in tag]
    shown = "\n".join(value.decode() for tag in texts for e in read.Tensors(tag) for value in e.tensor_proto.string_val)
    assert "the/model" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert all(line.startswith("    ") for line in shown.splitlines() if line)


@pytest.mark.slow
async def test_wandb_offline_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from searchr1_async.trackers import WandbTracker

    monkeypatch.setenv("WANDB_MODE", "offline")
    await play(WandbTracker(project="tests", group="a group"), a_run(tmp_path))
    file = only(tmp_path, "wandb/offline-run-*/run-*.wandb")
    history, config = read_wandb(file)
    rewards = [(row["step"], row["env/all/reward/total"]) for row in history if "env/all/reward/total" in row]
    assert rewards == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]
    assert [row["step"] for row in history if row.get("evaluation/exact_match") == 0.5] == [3]
    assert config["model"] == "the/model"
    assert config["learning_rate"] == 1e-3
    assert (tmp_path / "wandb-run-id.txt").read_text().strip() in file.name


def read_wandb(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """History rows and settings of an offline run, from W&B's protocol."""
    from wandb.proto import wandb_internal_pb2  # type: ignore[import-not-found]

    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return history, config


def records(content: bytes, block: int = 32768) -> Iterator[bytes]:
    """Records of a LevelDB-format log after its 7-byte header: parts of (checksum, length, kind, bytes)."""
    assert content.startswith(b":W&B")
    place, parts = 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or its last part
            yield parts
            parts = b""


@pytest.mark.slow
async def test_trackio_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from searchr1_async.trackers import TrackioTracker

    await play(TrackioTracker(project="tests", name="one"), a_run(tmp_path))
    await play(TrackioTracker(project="tests", name="one"), a_run(tmp_path, first=4, last=5))
    file = only(tmp_path, "trackio/*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    rewards = [
        (name, step, json.loads(text)) for name, step, text in rows if "env/all/reward/total" in json.loads(text)
    ]
    assert [(name, step) for name, step, _ in rewards] == [("one", step) for step in range(1, 6)]
    assert rewards[0][2]["env/all/reward/total"] == 0.1
