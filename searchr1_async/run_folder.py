"""A run's folder: claimed by one run at a time, resumed only as the run it holds, read back when it has ended."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import polars as pl
from filelock import FileLock, Timeout

from searchr1_async.billing import Billing, Cost, find_price
from searchr1_async.boundary.tables import read_parquet
from searchr1_async.episodes.types import Question
from searchr1_async.errors import CheckpointError, ConfigurationError, RunFolderError, first_error
from searchr1_async.evaluation.manifest import MANIFEST_NAME
from searchr1_async.evaluation.result import Evaluation
from searchr1_async.events import EvaluationFinished, StepFinished
from searchr1_async.files import write_atomically, write_parquet
from searchr1_async.inputs import refuse_other_measure
from searchr1_async.job import TrainingJob, TrainingResult
from searchr1_async.learn.checkpoints import ResumePoint, best_checkpoint
from searchr1_async.rollout.order import QuestionOrder
from searchr1_async.search import Search
from searchr1_async.search.record import record_of, search_of
from searchr1_async.trained import SEARCH_FILE, kept_record
from searchr1_async.usage import TokenUsage
from searchr1_async.watch.records import RunRecords
from searchr1_async.watch.rows import storable

logger = logging.getLogger(__name__)

UNTRAINED, AFTER_WARM_UP, AFTER_RL = "untrained", "after warm-up", "after RL"
"""Labels of the measurements that every run with held-out questions makes."""
AT_START = "at the start"
"""In place of :data:`UNTRAINED` where a run starts from weights."""
OF_NO_STEP = (UNTRAINED, AT_START)
"""Measurements before the run's own training: they belong to none of its kept weights."""
_QUESTIONS_FILE = "questions.parquet"
_QUESTIONS_SCHEMA = pl.Schema(
    {"id": pl.String, "question": pl.String, "golden_answers": pl.List(pl.String), "data_source": pl.String}
)
_LOCK_FILE, _TOKENIZER = "run.lock", "tokenizer"
_LOGS = {_LOCK_FILE, "service", "events.jsonl", "tensorboard", "wandb"}
_OWN_FILES = {_QUESTIONS_FILE, SEARCH_FILE, _TOKENIZER, "checkpoints.json"}
_OF_NO_USE = {*_LOGS, *_OWN_FILES, "tokenizer.partial"}
"""What a folder may hold in which no work was done."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Locks the folder for this run or evaluation. A folder that was created here is removed again if the input is refused."""
    is_new = not folder.exists()
    lock = FileLock(folder / _LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not at once: somebody who looks whether it is taken holds it for some microseconds.
        lock.acquire(timeout=0.2, poll_interval=0.02)
    except Timeout:
        raise RunFolderError(
            f"{folder} is in use by another run or evaluation: wait for its end, stop it, or choose another out_dir"
        ) from None
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be used as out_dir: {error.strerror or error}") from error
    try:
        yield
    except BaseException as error:
        is_refused = isinstance(first_error(error), ConfigurationError)
        if is_refused and is_new and {path.name for path in folder.iterdir()} <= _OF_NO_USE:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


async def keep_tokenizer(tokenizer: Any, folder: Path, *, anew: bool = False) -> None:
    """Keeps the model's tokenizer with the run, so that its episodes can be read token by token wherever the folder is.

    Args:
        anew: in place of one that an earlier attempt left there.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def keep() -> None:
        if (folder / _TOKENIZER).is_dir():
            if not anew:
                return
            shutil.rmtree(folder / _TOKENIZER, ignore_errors=True)
        partial = folder / "tokenizer.partial"
        try:
            with writing_records(folder):
                tokenizer.save_pretrained(partial)
                partial.replace(folder / _TOKENIZER)
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers with code of their own: their episodes are read without colours
            logger.warning("the tokenizer cannot be kept with the run: %s", type(error).__name__)
            shutil.rmtree(partial, ignore_errors=True)

    await anyio.to_thread.run_sync(keep)


def keep_questions(questions: Sequence[Question], folder: Path, *, anew: bool = False) -> None:
    """Keeps what a run is trained on with it, so that later evaluations can tell what they have in common. Written once.

    A lone surrogate, which no file holds, is kept as U+FFFD.

    Args:
        anew: in place of those that an earlier attempt left there.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    path = folder / _QUESTIONS_FILE
    if path.exists() and not anew:
        return
    rows = [
        (
            storable(one.id),
            storable(one.question),
            list(map(storable, one.golden_answers)),
            storable(one.data_source),
        )
        for one in questions
    ]
    with writing_records(folder):
        write_parquet(path, pl.DataFrame(rows, schema=_QUESTIONS_SCHEMA, orient="row"))


def keep_search(search: Search, folder: Path) -> None:
    """Keeps how the run's search is made with it, so that the trained model can be asked with the search that it was trained with.

    Written by every session: a resume may have moved the index.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with writing_records(folder):
        write_atomically(folder / SEARCH_FILE, json.dumps(record_of(search), indent=1).encode())


def kept_search(folder: Path) -> Search:
    """The search of the run in a folder, made anew. Reads a corpus whole: call it in a worker thread.

    Raises:
        ConfigurationError: it cannot be had; the message says to pass ``search=``.
        CorpusError, EmbeddingError, StoreError: as :meth:`Search.from_description`.
    """
    record = kept_record(folder)
    if record is None:
        raise ConfigurationError(
            f"the run in {folder} has not kept how its search is made (an earlier version began it): pass search=…, such as "
            "Search.local('atlas')"
        )
    try:
        return search_of(record, None, f"the run in {folder}")
    except ConfigurationError as error:
        raise type(error)(f"{error}, or pass search=…, which may be another") from error


def training_questions(folder: Path) -> tuple[Question, ...] | None:
    """The questions that the run in a folder is trained on. None where nothing tells.

    Of a folder that an earlier version of the package wrote: those of its recorded episodes.

    Raises:
        RunFolderError: they cannot be read.
    """
    path = folder / _QUESTIONS_FILE
    names = ["question_id", "question", "golden_answers", "data_source"]
    try:
        if path.exists():
            rows = read_parquet(path).select(_QUESTIONS_SCHEMA.names())
        else:
            played = RunRecords(folder).episodes().select(names)
            rows = played.unique(["data_source", "question_id"], keep="first", maintain_order=True).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunFolderError(f"the training questions of {folder} cannot be read: {error}") from error
    found = tuple(Question(id, question, tuple(answers), source) for id, question, answers, source in rows.iter_rows())
    return found or None


def is_claimed(folder: Path) -> bool:
    """Whether a run is under way in the folder, in this process or another. Looking changes nothing there."""
    path = folder / "run.lock"
    if not path.exists():
        return False
    try:
        import fcntl
    except ImportError:  # Windows, where an open file is locked as such
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


def find_point(job: TrainingJob) -> ResumePoint | None:
    """The resume point in the job's folder; None where there is none, or where a job that is not to resume would lose nothing
    by its own beginning. Cheap: it reads small files.

    Raises:
        RunFolderError: the folder holds a run's work and the job is not to resume, or it holds something else, or cannot be read.
    """
    point = ResumePoint.load(job.out_dir)
    if point is None:
        _refuse_others_files(job.out_dir)
    elif not job.resume:
        if work := work_in(job.out_dir, point):
            raise RunFolderError(
                f"{job.out_dir} holds a run ({work}): pass resume=True to go on with it, or choose another out_dir"
            )
        return None
    return point


def work_in(folder: Path, point: ResumePoint) -> str:
    """What a run has come to that a new one in its folder would lose, in words; empty where a start failed at once."""
    if point.step:
        return f"{point.step} steps"
    parts = {
        "warm-up steps": point.warm_up is not None and point.warm_up.step > 0,
        "kept weights": point.sampler_path is not None,
        "measurements": any((folder / "evaluations").glob("*.parquet")),
        "finished groups": any((folder / "unlearned").glob("*")),
    }
    found = [name for name, is_there in parts.items() if is_there]
    return f"0 steps, but {' and '.join(found)}" if found else ""


def _refuse_others_files(folder: Path) -> None:
    """Refuses a folder in which a run would write over files that are not a run's."""
    if (folder / MANIFEST_NAME).exists():
        raise RunFolderError(f"{folder} holds an evaluation: choose another out_dir")
    theirs = sorted(name for name in _OWN_FILES if (folder / name).exists())
    if theirs and not (folder / _LOCK_FILE).exists():  # after its first claim they are of an attempt that failed
        raise RunFolderError(
            f"{folder} holds {', '.join(theirs)}, which a run would write over: choose another out_dir"
        )


def load_point(job: TrainingJob, identity: Mapping[str, Any], order: QuestionOrder) -> ResumePoint | None:
    """Where the run in the folder stands; None where there is none.

    Raises:
        RunFolderError: there is one and it is not to be resumed, has other settings or questions, or was measured otherwise.
    """
    point = find_point(job)
    if point is None:
        return None
    try:
        point.refuse_changes(identity, order.fingerprint)
        if job.held_out and RunRecords(job.out_dir).evaluation_labels():
            refuse_other_measure(point.inputs, identity["inputs"])
    except RunFolderError:
        if work_in(job.out_dir, point):
            raise
        return None  # a start that failed, and is corrected
    return point


def finished_result(job: TrainingJob, point: ResumePoint, order: QuestionOrder) -> TrainingResult | None:
    """The result of a run that has nothing left to do, from its folder alone: no service is started for it."""
    records = RunRecords(job.out_dir)
    is_measured = not job.held_out or evaluation_steps(records).get(AFTER_RL) == point.step
    if not job.is_over(point, order) or point.sampler_step != point.step or not is_measured:
        return None
    return result_of(job.out_dir, point, "finished")


def result_of(folder: Path, point: ResumePoint | None, reason: str) -> TrainingResult:
    """What a run has come to, from its folder."""
    return TrainingResult(
        out_dir=folder,
        steps=point.step if point else 0,
        reason=reason,
        checkpoint=point.sampler_path if point else None,
        evaluations=load_evaluations(RunRecords(folder)),
        seconds=point.seconds if point else 0.0,
        best=best_checkpoint(folder),
        cost=None if point is None else _cost_of(point),
    )


def _cost_of(point: ResumePoint) -> Cost:
    price = find_price(point.base_model)
    is_free = point.dollars == 0.0 and point.tokens != TokenUsage()
    billing = Billing(price, is_free, "" if price else f"the price of {point.base_model} is not known")
    today = billing.dollars(point.tokens)
    if point.dollars is not None and (today is None or not math.isclose(today, point.dollars, rel_tol=1e-6)):
        billing = Billing()  # at a price that its user stated, or of another day: that of the table did not make it
    return billing.cost_of(point.dollars, point.tokens)


@contextmanager
def writing_records(folder: Path) -> Iterator[None]:
    """A disk that is full, or a folder that cannot be written, becomes an error that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the records in {folder} could not be written: {error.strerror or error}. The run's last resume point is "
            "whole: make room and resume."
        ) from error


def evaluation_steps(records: RunRecords) -> dict[str, int | None]:
    """The labels of a run's evaluations, in the order in which they were made, with the optimiser steps before each."""
    steps = dict(records.evaluations().select("label", "step").unique().collect().iter_rows())
    return {label: steps.get(label) for label in records.evaluation_labels()}


def load_evaluations(records: RunRecords) -> tuple[Evaluation, ...]:
    """The evaluations of a run, read back from its folder by their steps."""
    loaded = [load_evaluation(records, label, step) for label, step in evaluation_steps(records).items()]
    return tuple(sorted(loaded, key=lambda evaluation: (evaluation.label not in OF_NO_STEP, evaluation.step or 0)))


def load_evaluation(records: RunRecords, label: str, step: int | None) -> Evaluation:
    """One evaluation of a run, read back from its folder."""
    return Evaluation.of(label, records.load_evaluation(label), step)


def past_events(folder: Path) -> list[StepFinished | EvaluationFinished]:
    """The steps and evaluations that a run has on record, as the events that told of them: for a view of its next session."""
    records = RunRecords(folder)
    try:
        metrics, evaluations = records.metrics(), load_evaluations(records)
    except (OSError, RunFolderError) as error:  # a view lacks its beginning; the run itself will say more
        logger.warning("what %s has on record cannot be read: %s", folder, error)
        return []
    steps = [
        StepFinished(row.pop("step"), {name: value for name, value in row.items() if value is not None})
        for row in metrics.iter_rows(named=True)
    ]
    measured = [EvaluationFinished(found.label, found.step, found.metrics()) for found in evaluations]
    return [*steps, *measured]
