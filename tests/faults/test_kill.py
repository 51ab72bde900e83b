"""A training process killed at any moment: nothing finished is lost, nothing is trained on twice, nothing is left running."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from searchr1_async.learn.checkpoints import ResumePoint
from searchr1_async.watch.records import RunRecords
from tests import tiny_world

PER_STEP, GROUP_SIZE = 3, 2


class Child:
    """One session of the run, in a process of its own."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.lines: list[str] = []
        with (folder / "errors.log").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.training_child", folder, tiny_world.model_folder(), str(steps)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=tiny_world.child_environment(),
            )

    def read_until(self, condition: Callable[[str], bool]) -> bool:
        """Reads what it says; False when it has ended before the condition held."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if condition(line.strip()):
                return True
        return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.read_until(lambda line: False)
        self.end()

    def end(self) -> int:
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(60)

    def said(self, word: str) -> list[int]:
        return [int(line.split()[1]) for line in self.lines if line.startswith(word + " ")]


def assert_service_ends(child: Child) -> None:
    """Nobody tells the service that its parent was killed: it must see it by itself, within seconds."""
    deadline = time.monotonic() + 20
    for pid in child.said("service"):
        while tiny_world.is_running(pid):
            assert time.monotonic() < deadline, f"the service {pid} outlives its parent"
            time.sleep(0.1)


def assert_nothing_is_lost(folder: Path, told: int) -> int:
    """What is on disk after a kill: all steps that were told of, and at most the one being written beyond them."""
    point = ResumePoint.load(folder / "run")
    step = point.step if point else 0
    assert step >= told, "a step that was finished is gone"
    assert step <= told + 1
    recorded = RunRecords(folder / "run").metrics()["step"].to_list()
    assert recorded[:step] == list(range(1, step + 1))
    assert len(recorded) <= step + 1
    return step


def assert_every_question_once(folder: Path, steps: int) -> None:
    records = RunRecords(folder / "run")
    assert records.metrics()["step"].to_list() == list(range(1, steps + 1))
    episodes = records.episodes().select("step", "question_id", "member").collect()
    by_step = episodes.group_by("step", maintain_order=True).agg(pl.col("question_id").n_unique(), pl.len())
    assert by_step["step"].to_list() == list(range(1, steps + 1))
    assert by_step["question_id"].to_list() == [PER_STEP] * steps
    assert by_step["len"].to_list() == [PER_STEP * GROUP_SIZE] * steps
    questions = episodes.group_by("question_id").len()
    assert questions["len"].to_list() == [GROUP_SIZE] * (PER_STEP * steps), "every question of the epoch exactly once"


def train_through_kills(folder: Path, steps: int, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    folder.mkdir(exist_ok=True)
    told, killed = 0, 0
    while True:
        child = Child(folder, steps)
        # Killed some episodes after some further step: in the middle of sampling, of learning or of writing down.
        goal = told + chance.randrange(0, 3)
        left = chance.randrange(1, 2 * PER_STEP * GROUP_SIZE)

        def is_moment(line: str, goal: int = goal) -> bool:
            nonlocal left
            word, number = line.split()
            if word == "episode" and int(number) > goal:
                left -= 1
            return left == 0

        if killed < kills and child.read_until(is_moment):
            time.sleep(chance.random() * 0.3)
            child.kill()
            killed += 1
            told = max([told, *child.said("step")])
            assert_service_ends(child)
            told = assert_nothing_is_lost(folder, told)
            continue
        child.read_until(lambda line: False)
        code = child.end()
        assert code == 0, (folder / "errors.log").read_text()[-3000:]
        assert child.said("finished") == [steps]
        assert killed == kills, "the run was over before it could be killed"
        assert_service_ends(child)
        break
    assert_every_question_once(folder, steps)


def test_a_run_killed_once_goes_on_where_it_stood(tmp_path: Path) -> None:
    train_through_kills(tmp_path / "world", steps=5, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_killed_again_and_again_trains_a_whole_epoch_once(tmp_path: Path, seed: int) -> None:
    train_through_kills(tmp_path / "world", steps=12, kills=4, seed=seed)
