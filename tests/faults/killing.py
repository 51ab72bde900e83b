"""Runs that are killed at random moments and resumed, and what must hold afterwards."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.local import LocalService
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.folder import UnlearnedGroups
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world
from tests.faults import scripted_world

KINDS = ("start", "sampling", "learning", "saving", "recording")
"""Moments: while it starts or resumes, while episodes are played, right after examples went to the trainer, a little later,
and between a step's first record and its resume point."""
MAX_UNSAVED_SECONDS = 5.0
"""They gather for 0.2 s and are written in a thread; the rest is for a machine with other work."""
SESSION_SECONDS = 240.0
"""After so long a session counts as hanging."""


@dataclass(frozen=True)
class Plan:
    """One run."""

    settings: Mapping[str, Any]
    """Arguments of ``train``, besides those of the scripted world."""
    questions: int = 60

    @property
    def max_staleness(self) -> int:
        return self.settings.get("max_staleness", 0)

    @property
    def depends_on_time(self) -> bool:
        """Which groups are dropped depends on which are slow."""
        return bool(self.settings.get("spare_groups"))


class Session:
    """One session of a run, in a process of its own; what it says is read by a thread."""

    def __init__(self, plan: Plan, folder: Path, service: LocalService) -> None:
        command = [sys.executable, "-m", "tests.faults.training_child", folder, service.url, service.tokenizer_path]
        self.began = time.monotonic()
        self.lines: list[str] = []
        self._times: list[float] = []
        self._is_over = False
        self.killed_at = float("inf")
        with (folder / "errors.log").open("ab") as errors:
            self._process = subprocess.Popen(
                [*command, str(plan.questions), json.dumps(dict(plan.settings))],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=tiny_world.child_environment() | {"TINKER_API_KEY": service.api_key},
            )
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                with self._changed:
                    self.lines.append(line.strip())
                    self._times.append(time.monotonic())
                    self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    @property
    def has_ended(self) -> bool:
        """It has said its last."""
        return self._is_over

    def wait_for(self, word: str, count: int) -> bool:
        """Until it has said the word so often; False when it has ended before."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.said(word)) >= count or self._is_over, SESSION_SECONDS)
            return len(self.said(word)) >= count

    def said(self, word: str) -> list[str]:
        """What followed the word, each time."""
        return [rest for first, _, rest in (line.partition(" ") for line in self.lines) if first == word]

    def age(self, line: str) -> float:
        """Seconds before its kill when it said this; infinite where it never did."""
        said = [at for at, other in zip(self._times, self.lines, strict=True) if other == line]
        return self.killed_at - said[-1] if said else float("inf")

    def kill(self) -> None:
        """SIGKILL; what it had said is read to its end."""
        self.killed_at = time.monotonic()
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def finish(self) -> int:
        """Waits for its end; its exit code."""
        try:
            return self._process.wait(SESSION_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a session hangs; the last it said: {self.lines[-3:]}") from None
        finally:
            self.kill()


@dataclass
class Ledger:
    """What a run lived through."""

    kills: list[str] = field(default_factory=list)
    """The kind of each moment."""
    steps_at_kills: list[int] = field(default_factory=list)
    kept: int = 0
    """Groups that a resume found finished, not in any recorded step, and of weights that still exist."""
    unsaved: int = 0
    """Groups that had finished before a kill and were not on disk yet."""
    oldest_unsaved: float = 0.0
    """Seconds before its kill when the oldest of those had finished."""
    futureless: int = 0
    """Groups that were on disk, but of weights that were never saved."""
    played: Counter[str] = field(default_factory=Counter)
    """How often each question's group was played to its end."""
    seconds: float = 0.0


def train_through_kills(
    plan: Plan, folder: Path, service: LocalService, kinds: Sequence[str], chance: random.Random
) -> Ledger:
    """Plays a run to its end, killing one session after another; a run that is over before has fewer kills.

    Args:
        folder: of the run and its search; made here.
        kinds: of the moments, in their order.

    Raises:
        AssertionError: something finished is lost, or played again though it was on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ledger, began, told = Ledger(), time.monotonic(), 0
    kept: set[str] = set()
    waiting = list(kinds)
    while True:
        session = Session(plan, folder, service)
        if waiting:
            wait_for_moment(waiting[0], session, folder / "run", chance)
        if is_over := session.has_ended or not waiting:
            code = session.finish()
            assert code == 0, (folder / "errors.log").read_text()[-3000:]
        else:
            session.kill()
            ledger.kills.append(waiting.pop(0))
        again = kept & set(session.said("episode"))
        assert not again, f"finished and on disk, and played again: {sorted(again)}"
        ledger.played.update(session.said("group"))
        if is_over:
            break
        told = max([told, *map(int, session.said("step"))])
        point = ResumePoint.load(folder / "run")
        ledger.steps_at_kills.append(assert_nothing_is_lost(folder / "run", point, told))
        kept = _look(plan, folder / "run", point, session, kept, ledger)
    ledger.seconds = time.monotonic() - began
    return ledger


def wait_for_moment(kind: str, session: Session, run: Path, chance: random.Random) -> None:
    """Until the moment has come, or the session has ended; but for the start, after up to two further steps."""
    if kind != "start":
        session.wait_for("step", chance.randrange(3))
    match kind:
        case "start":
            # Importing and connecting take some seconds; the later half falls into resuming and the first episodes.
            session.wait_for("awake", 1)
            pause = chance.uniform(0.0, 2.0)
        case "sampling":
            session.wait_for("episode", len(session.said("episode")) + chance.randrange(1, 30))
            pause = chance.uniform(0.0, 0.1)
        case "learning":
            session.wait_for("minibatch", len(session.said("minibatch")) + chance.randrange(1, 4))
            pause = chance.uniform(0.0, 0.03)
        case "saving":
            session.wait_for("minibatch", len(session.said("minibatch")) + chance.randrange(1, 4))
            pause = chance.uniform(0.03, 0.8)
        case "recording":
            _wait_for_record(session, run)
            pause = chance.uniform(0.0, 0.03)
        case _:
            raise ValueError(kind)
    time.sleep(pause)


def _wait_for_record(session: Session, run: Path) -> None:
    """Until a step's episodes are being written."""
    before = _records(run)
    deadline = time.monotonic() + SESSION_SECONDS
    # Asked again and again: the moment is over in some milliseconds, and nobody tells of it.
    while not session.has_ended and _records(run) <= before and time.monotonic() < deadline:
        time.sleep(0.0005)


def _records(run: Path) -> set[str]:
    try:
        return {path.name for path in (run / "episodes").iterdir()}
    except FileNotFoundError:
        return set()


def assert_nothing_is_lost(run: Path, point: ResumePoint | None, told: int) -> int:
    """All steps that were told of are on disk, with their records; returns the step of the resume point."""
    step = point.step if point else 0
    assert step >= told, f"step {told} was told of and is gone: the resume point is at {step}"
    recorded = RunRecords(run).metrics()["step"].to_list()
    assert recorded[:step] == list(range(1, step + 1))
    assert len(recorded) <= step + 1
    return step


def _look(
    plan: Plan, run: Path, point: ResumePoint | None, session: Session, kept_before: set[str], ledger: Ledger
) -> set[str]:
    """What a kill left: the questions whose groups a resume need not play, and into the ledger, how many it has to.

    A group sampled from weights that were published and never saved belongs to a future that is lost: it is played again.
    """
    if point is None:
        assert not session.said("group"), "groups were played before there was a resume point"
        return set()
    order = scripted_world.order(plan.questions)
    with tempfile.TemporaryDirectory() as copy:
        if (run / "unlearned").is_dir():
            shutil.copytree(run / "unlearned", copy, dirs_exist_ok=True)
        found = UnlearnedGroups(Path(copy)).load()
    groups = {place: group for place, group in found.items() if place >= point.next_place or place in point.open_places}
    on_disk = {order.question(place).id for place in groups}
    kept = {
        order.question(place).id
        for place, group in groups.items()
        if all(version <= point.step for version in group.policy_versions)
    }
    recorded = set(RunRecords(run).groups().filter(pl.col("step") <= point.step).collect()["question_id"])
    assert kept_before <= recorded | on_disk, "what an earlier kill left on disk is gone"
    unsaved = set(session.said("group")) - recorded - on_disk
    ages = [session.age(f"group {question}") for question in unsaved]
    assert max(ages, default=0.0) < MAX_UNSAVED_SECONDS, f"finished long before the kill and not on disk: {ages}"
    ledger.kept += len(kept)
    ledger.unsaved += len(unsaved)
    ledger.futureless += len(on_disk - kept)
    ledger.oldest_unsaved = max([ledger.oldest_unsaved, *ages])
    return kept


def outcome(run: Path) -> dict[str, str | None]:
    """Of each question why it was dropped, or None where it was trained on."""
    groups = RunRecords(run).groups().collect()
    return dict(zip(groups["question_id"], groups["drop_reason"], strict=True))


def assert_epoch_is_whole(plan: Plan, run: Path) -> None:
    """Every question of the epoch is in exactly one step, trained on or dropped with a reason, and in time.

    Raises:
        AssertionError: it is not so.
    """
    records = RunRecords(run)
    groups, episodes = records.groups().collect(), records.episodes().collect()
    order = scripted_world.order(plan.questions)
    steps = records.metrics()["step"].to_list()
    assert steps == list(range(1, len(steps) + 1))
    assert groups["step"].unique().sort().to_list() == steps
    assert sorted(groups["place"]) == list(range(plan.questions)), "every place exactly once"
    assert groups["question_id"].to_list() == [order.question(place).id for place in groups["place"]]
    assert groups.filter(pl.col("trained") != pl.col("drop_reason").is_null()).is_empty()
    played = groups.filter(pl.col("members") > 0)
    # A step's own weights are those of the step before; k steps older may be what its groups were sampled from.
    late = played.filter(pl.col("policy_version_min") < pl.col("step") - 1 - plan.max_staleness)
    assert late.is_empty(), f"trained on too late: {late.to_dicts()}"
    assert played.filter(pl.col("policy_version_max") >= pl.col("step")).is_empty(), (
        "sampled from weights of its future"
    )
    members = episodes.group_by("place").agg(pl.len().alias("rows"), pl.col("member").n_unique())
    whole = members.join(groups, on="place").filter(
        (pl.col("rows") != pl.col("members") + pl.col("failed")) | (pl.col("rows") != pl.col("member"))
    )
    assert whole.is_empty(), "a group's episodes are missing or doubled"
    trained = groups.filter("trained")
    size = plan.settings.get("group_size", scripted_world.SETTINGS["group_size"])
    assert (trained["members"] + trained["failed"]).to_list() == [size] * trained.height
    left = list((run / "unlearned").glob("*")) if (run / "unlearned").exists() else []
    assert not left, "groups are left that no step holds"


def assert_same_outcome(plan: Plan, run: Path, uninterrupted: Path) -> None:
    """The same questions were trained on, and the same dropped for the same reasons, as in a run that nobody killed.

    Raises:
        AssertionError: it is not so.
    """
    ours, theirs = outcome(run), outcome(uninterrupted)
    assert set(ours) == set(theirs)
    if not plan.depends_on_time:
        differing = {
            question: (ours[question], theirs[question]) for question in ours if ours[question] != theirs[question]
        }
        assert not differing, differing
