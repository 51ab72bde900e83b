"""Ctrl-C, SIGTERM and SIGHUP in real processes: wherever they land, the run ends cleanly, in a line, and can go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from searchr1_async.local import LocalService
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world

QUESTIONS = 48
SETTINGS: dict[str, Any] = {"held_out": 6, "warm_up": 3, "groups_per_batch": 6, "checkpoint_every": 2}
SECONDS = 60.0
"""In which an interrupted session has ended; it took 1 to 3 s."""
LAUNCHER = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Starts a program with SIGINT ignored, as a shell does in the background, or not, however these tests were started."""


@dataclass
class Session:
    """A training process, and what it says."""

    folder: Path
    service: LocalService
    sigint: str = "default"
    new_group: bool = True
    lines: list[str] = field(default_factory=list)

    def __enter__(self) -> Session:
        self.folder.mkdir(parents=True, exist_ok=True)
        program = ["-m", "tests.faults.training_child", self.folder, self.service.url, self.service.tokenizer_path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, self.sigint, *program, str(QUESTIONS), json.dumps(SETTINGS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=tiny_world.child_environment() | {"TINKER_API_KEY": self.service.api_key},
            process_group=0 if self.new_group else None,
        )
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, word: str, count: int = 1) -> None:
        """Until it has said the word so often in all."""
        assert self.process.stdout is not None
        while sum(line.split()[0] == word for line in self.lines) < count:
            line = self.process.stdout.readline()
            assert line, f"it ended before it said {word!r} {count} times: {self.process.communicate()[1]}"
            self.lines.append(line.strip())

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """As a terminal: its whole process group, where it is alone in it."""
        (os.killpg if self.new_group else os.kill)(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Its exit status, as a shell has it, and its standard error."""
        out, errors = self.process.communicate(timeout=SECONDS)
        self.lines += out.splitlines()
        code = self.process.returncode
        return (128 - code if code < 0 else code), errors


def assert_clean(session: Session, status: int = 130) -> ResumePoint | None:
    """It ended as an interrupted program should, and its folder is whole."""
    found, errors = session.end()
    assert "Traceback" not in errors, errors[:1500]
    assert found == status, errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert "keeps every finished step" in errors
    run = session.folder / "run"
    point = ResumePoint.load(run)
    if point is not None:
        assert RunRecords(run).metrics()["step"].to_list() == list(range(1, point.step + 1))
        assert session.lines[-1] == "ended stopped", session.lines[-3:]
    return point


MOMENTS = {
    "start": ("running", 1),
    "measurement": ("evaluate", 1),
    "warm-up": ("warm-up", 1),
    "rollout": ("episode", 5),
    "learner": ("minibatch", 4),
    "saving": ("step", 1),
    "recorded": ("step", 2),
}
"""What a session has said shortly before it is interrupted."""


@pytest.mark.parametrize(
    ("moment", "sigint"), [("rollout", "ignored"), pytest.param("learner", "default", marks=pytest.mark.slow)]
)
def test_one_interrupt_keeps_a_checkpoint_and_says_one_line(
    scripted_service: LocalService, tmp_path: Path, moment: str, sigint: str
) -> None:
    with Session(tmp_path, scripted_service, sigint) as session:
        session.wait_for(*MOMENTS[moment])
        session.interrupt()
        point = assert_clean(session)
    assert point is not None
    assert point.sampler_step == point.step, "the last weights are kept for sampling"


@pytest.mark.slow  # tests/runs/test_run_in_programs.py has the same of SIGTERM in a program of this process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_scheduler_that_ends_the_process_is_obeyed_as_ctrl_c_is(
    scripted_service: LocalService, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with Session(tmp_path, scripted_service) as session:
        session.wait_for("episode", 3)
        session.interrupt(number)
        point = assert_clean(session, status)
    assert point is not None
    assert point.sampler_step == point.step


def test_a_second_interrupt_ends_at_once(scripted_service: LocalService, tmp_path: Path) -> None:
    with Session(tmp_path, scripted_service) as session:
        session.wait_for("minibatch", 1)
        session.interrupt()
        time.sleep(0.6)  # a repetition within half a second is the same Ctrl-C
        if session.process.poll() is None:
            session.interrupt()
        status, errors = session.end()
    assert status == 130
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupts_at_many_moments(scripted_service: LocalService, tmp_path: Path, moment: str, seed: int) -> None:
    """Foreground and background, ignored and not; then the same run to its end."""
    chance = random.Random(f"{moment}/{seed}")
    sigint, new_group = ("default", "ignored")[seed % 2], seed != 1
    with Session(tmp_path, scripted_service, sigint, new_group) as session:
        session.wait_for(*MOMENTS[moment])
        time.sleep(chance.uniform(0.0, 1.5 if moment == "start" else 0.3))
        began = time.monotonic()
        session.interrupt()
        assert_clean(session)
        sys.stdout.write(f"{moment}, SIGINT {sigint}: ended after {time.monotonic() - began:.2f} s\n")
    with Session(tmp_path, scripted_service) as session:
        session.wait_for("finished")
        assert session.end() == (0, "")
    assert RunRecords(tmp_path / "run").metrics()["step"].to_list() == list(range(1, QUESTIONS // 6 + 1))
