"""A run's folder: claimed by one run at a time, resumed only by the same run, read back afterwards.

Its ``unlearned/`` holds finished groups until a recorded step contains them, so that a killed run need not redo them. A failed write
of the records is a :class:`CheckpointError`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import polars as pl
from filelock import FileLock, Timeout

from searchr1_async.billing import Billing, Cost, CostEstimate, TokenUsage
from searchr1_async.boundary.paths import parquet_bytes, remove_leftovers, write_atomically, write_parquet
from searchr1_async.boundary.tables import read_parquet
from searchr1_async.config import TrainConfig
from searchr1_async.episodes.table import groups_from_frame, kept_groups_frame, storable
from searchr1_async.episodes.types import Group, Question
from searchr1_async.errors import CheckpointError, ConfigurationError, RunFolderError
from searchr1_async.events import EvaluationFinished, StepFinished
from searchr1_async.models import find_price
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.runs.resume import KeptCheckpoint, ResumePoint, best_checkpoint, writing_records
from searchr1_async.runs.weights import SEARCH_FILE, kept_record
from searchr1_async.search.search import Search

logger = logging.getLogger(__name__)

UNTRAINED, AFTER_WARM_UP, AFTER_RL = "untrained", "after warm-up", "after RL"
"""Labels of the evaluations of every run with held-out questions."""
AT_START = "at the start"
"""Replaces :data:`UNTRAINED` if a run starts from weights."""
OF_NO_STEP = (UNTRAINED, AT_START)
"""Evaluations before the run's own training: no kept weights belong to them."""
MANIFEST_NAME = "manifest.json"
"""File of an evaluation's folder, which no run may use."""
_QUESTIONS_FILE = "questions.parquet"
_QUESTIONS_SCHEMA = pl.Schema(
    {"id": pl.String, "question": pl.String, "golden_answers": pl.List(pl.String), "data_source": pl.String}
)
_LOCK_FILE, _TOKENIZER = "run.lock", "tokenizer"
CONFIG_FILE = "config.toml"
_OWN_FILES = {_QUESTIONS_FILE, SEARCH_FILE, CONFIG_FILE, _TOKENIZER, "checkpoints.json"}
_GROUPS = re.compile(r"\d{8,}-[0-9a-f]{8}\.parquet")
_UNREADABLE = (pl.exceptions.PolarsError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Raised by a file that is intact but holds no groups."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Locks the folder, which is created if it is missing."""
    lock = FileLock(folder / _LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not immediately: another process checking the lock holds it for some microseconds.
        lock.acquire(timeout=0.2, poll_interval=0.02)
    except Timeout:
        raise RunFolderError(
            f"{folder} is in use by another run or evaluation: wait until it ends, stop it, or choose another out_dir"
        ) from None
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be used as out_dir: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


async def keep_tokenizer(tokenizer: Any, folder: Path, *, anew: bool = False) -> None:
    """Saves the model's tokenizer in the run's folder, so its episodes can be decoded anywhere; ``anew`` replaces an old one."""
    kept, partial = folder / _TOKENIZER, folder / "tokenizer.partial"

    def keep() -> None:
        if kept.is_dir() and not anew:
            return
        shutil.rmtree(kept, ignore_errors=True)
        try:
            with writing_records(folder):
                tokenizer.save_pretrained(partial)
                partial.replace(kept)
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers with custom code: episodes are shown without token colours
            logger.warning("cannot save the tokenizer in the run's folder: %s", type(error).__name__)
            shutil.rmtree(partial, ignore_errors=True)

    await anyio.to_thread.run_sync(keep)


def keep_questions(questions: Sequence[Question], folder: Path, *, anew: bool = False) -> None:
    """Saves a run's training questions, so later evaluations can find overlaps; ``anew`` replaces old ones.

    A lone surrogate, which no file can hold, becomes U+FFFD.
    """
    path = folder / _QUESTIONS_FILE
    if path.exists() and not anew:
        return
    rows = [
        (storable(one.id), storable(one.question), list(map(storable, one.golden_answers)), storable(one.data_source))
        for one in questions
    ]
    with writing_records(folder):
        write_parquet(path, pl.DataFrame(rows, schema=_QUESTIONS_SCHEMA, orient="row"))


def keep_search(search: Search, folder: Path) -> None:
    """Saves how the run's search is built. Every session writes it, since a resume may have moved the index."""
    with writing_records(folder):
        write_atomically(folder / SEARCH_FILE, json.dumps(search.record(), indent=1).encode())


def keep_config(config: TrainConfig, folder: Path) -> None:
    """Saves the run's settings, sizes included. Every session writes them, since a resume may change some."""
    with writing_records(folder):
        config.save(folder / CONFIG_FILE)


def kept_search(folder: Path) -> Search:
    """Rebuilds the search of the run in a folder. Reads the whole corpus: call it in a worker thread."""
    record = kept_record(folder)
    if record is None:
        raise ConfigurationError(
            f"the run in {folder} has no record of its search (it was started by an earlier version): pass search=…, such as "
            "Search.local('atlas')"
        )
    try:
        return Search.from_record(record, None, f"the run in {folder}")
    except ConfigurationError as error:
        raise type(error)(f"{error}, or pass search=…, which may be a different search") from error


def training_questions(folder: Path) -> tuple[Question, ...] | None:
    """The training questions of the run in a folder, None if unknown. Older folders: those of the recorded episodes."""
    path = folder / _QUESTIONS_FILE
    names = ["question_id", "question", "golden_answers", "data_source"]
    try:
        if path.exists():
            rows = read_parquet(path).select(_QUESTIONS_SCHEMA.names())
        else:
            played = RunRecords(folder).episodes().select(names)
            rows = played.unique(["data_source", "question_id"], keep="first", maintain_order=True).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunFolderError(f"cannot read the training questions of {folder}: {error}") from error
    found = tuple(Question(id, question, tuple(answers), source) for id, question, answers, source in rows.iter_rows())
    return found or None


def is_claimed(folder: Path) -> bool:
    """Whether this or another process runs in the folder. Checking changes nothing there."""
    path = folder / _LOCK_FILE
    if not path.exists():
        return False
    try:
        import fcntl
    except ImportError:  # Windows, where the file itself is locked
        try:
            with FileLock(path).acquire(timeout=0):
                return False
        except (Timeout, OSError):
            return True
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def find_point(folder: Path, *, resume: bool) -> ResumePoint | None:
    """The resume point in the folder, if any; None also if a run without ``resume`` would lose no work there. Cheap."""
    point = ResumePoint.load(folder)
    if point is not None:
        work = "" if resume else work_in(folder, point)
        if work:
            raise RunFolderError(
                f"{folder} holds a run ({work}): pass resume=True to continue it, or choose another out_dir"
            )
        return point if resume else None
    theirs = sorted(name for name in _OWN_FILES if (folder / name).exists())
    # After a first claim they are leftovers of a failed attempt.
    if (folder / MANIFEST_NAME).exists() or (theirs and not (folder / _LOCK_FILE).exists()):
        raise RunFolderError(
            f"{folder} holds {', '.join(theirs) or 'an evaluation'}, which a run would overwrite: choose another out_dir"
        )
    return None


def work_in(folder: Path, point: ResumePoint) -> str:
    """The work a new run in the folder would lose, as text; empty if the start failed at once."""
    if point.step:
        return f"{point.step} steps"
    parts = {
        "warm-up steps": bool(point.warm_up),
        "kept weights": point.sampler_path is not None,
        "evaluations": any((folder / "evaluations").glob("*.parquet")),
        "finished groups": any((folder / "unlearned").glob("*")),
    }
    found = [name for name, is_there in parts.items() if is_there]
    return f"0 steps, but {' and '.join(found)}" if found else ""


@dataclass(frozen=True)
class TrainingResult:
    """Result of a run. All of it can be read back from ``out_dir``."""

    out_dir: Path
    steps: int
    """Optimizer steps finished. All figures include the run's earlier sessions."""
    reason: str
    """``finished``, ``time_limit``, ``max_cost`` or ``stopped``. Read from a folder also ``failed``, ``running``, or ``ended`` if the log does
    not say why."""
    checkpoint: str | None
    """``tinker://`` path of the last weights kept for sampling."""
    evaluations: tuple[Evaluation, ...]
    """On the held-out questions, in order."""
    seconds: float
    """Of reinforcement learning."""
    best: KeptCheckpoint | None = None
    """As :attr:`RecordedRun.best`."""
    cost: Cost | None = None
    estimated_cost: CostEstimate | None = None
    """Of the whole run; None for a run read from its folder."""


def result_of(folder: Path, point: ResumePoint | None, reason: str) -> TrainingResult:
    """A run's result so far, from its folder."""
    return TrainingResult(
        out_dir=folder,
        steps=point.step if point else 0,
        reason=reason,
        checkpoint=point.sampler_path if point else None,
        evaluations=load_evaluations(RunRecords(folder)),
        seconds=point.seconds if point else 0.0,
        best=best_checkpoint(folder),
        cost=None if point is None else _cost_at(point),
    )


def _cost_at(point: ResumePoint) -> Cost:
    price = find_price(point.base_model)
    is_free = point.dollars == 0.0 and point.tokens != TokenUsage()
    billing = Billing(price, is_free, "" if price else f"the price of {point.base_model} is unknown")
    today = billing.dollars(point.tokens)
    if point.dollars is not None and (today is None or not math.isclose(today, point.dollars, rel_tol=1e-6)):
        billing = Billing()  # a user's price, or an older one: the table's does not apply
    return billing.cost_of(point.dollars, point.tokens)


def evaluation_steps(records: RunRecords) -> dict[str, int | None]:
    """Labels of a run's evaluations, in the order they were made, with the optimizer steps before each."""
    steps = dict(records.evaluations().select("label", "step").unique().collect().iter_rows())
    return {label: steps.get(label) for label in records.evaluation_labels()}


def load_evaluations(records: RunRecords) -> tuple[Evaluation, ...]:
    """A run's evaluations, read from its folder, by step."""
    loaded = [load_evaluation(records, label, step) for label, step in evaluation_steps(records).items()]
    return tuple(sorted(loaded, key=lambda evaluation: (evaluation.label not in OF_NO_STEP, evaluation.step or 0)))


def load_evaluation(records: RunRecords, label: str, step: int | None) -> Evaluation:
    """One evaluation of a run, read from its folder."""
    return Evaluation.of(label, records.load_evaluation(label), step)


def past_events(folder: Path) -> list[StepFinished | EvaluationFinished]:
    """A run's recorded steps and evaluations as events, for the view of its next session."""
    records = RunRecords(folder)
    try:
        steps = records.metrics().iter_rows(named=True)
        measured = [EvaluationFinished(each.label, each.step, each.metrics()) for each in load_evaluations(records)]
    except (OSError, RunFolderError) as error:  # only the view lacks its history; the run reports more
        logger.warning("cannot read the records of %s: %s", folder, error)
        return []
    known = [{name: value for name, value in row.items() if value is not None} for row in steps]
    return [*(StepFinished(int(row.pop("step")), row) for row in known), *measured]


class UnlearnedGroups:
    """Finished groups that no recorded step contains yet: one file per group, ``00000012-1a2b3c4d.parquet``: its place and its CRC-32,
    since Parquet itself does not notice a damaged disk. Methods block on disk I/O: call them in a worker thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, groups: Mapping[int, Group]) -> None:
        """Stores groups by place, instead of earlier ones of the same places; OSError if the disk is full."""
        if not groups:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self.forget(groups)  # first: after a kill, no session has to choose between two
        # One table for all, since most of the time goes into making one.
        for (place,), rows in kept_groups_frame(groups).partition_by("place", as_dict=True).items():
            content = parquet_bytes(rows)
            write_atomically(self._folder / f"{place:08d}-{zlib.crc32(content):08x}.parquet", content)

    def load(self) -> dict[int, Group]:
        """The groups on disk, by place; deletes damaged files. Raises OSError if the folder is not readable.

        A recorded step may contain some of them, if the process was killed before they were forgotten.
        """
        found: dict[int, Group] = {}
        remove_leftovers(self._folder)
        for path in self._files():
            try:
                if path.stem.endswith(f"-{zlib.crc32(path.read_bytes()):08x}"):
                    found |= groups_from_frame(read_parquet(path))
                    continue
                problem = "another checksum"
            except _UNREADABLE as error:
                problem = type(error).__name__
            logger.warning("%s is damaged (%s): its group is rolled out again", path, problem)
            path.unlink()
        return found

    def forget(self, places: Iterable[int]) -> None:
        """Deletes groups that a recorded step contains or that are no longer needed; unknown places are ignored."""
        gone = {f"{place:08d}" for place in places}
        for path in self._files():
            if path.name[:8] in gone:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes everything: the run starts over."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*.parquet") if _GROUPS.fullmatch(path.name))
