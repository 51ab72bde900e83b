"""Turns the arguments of ``train`` into a checked job, before anything starts or is written.

Training questions must not overlap with the held-out ones.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio
import polars as pl

from searchr1_async.boundary.settings import settings_of
from searchr1_async.config import TrainConfig, chosen_sizes
from searchr1_async.data.questions import checked_questions, optional_questions
from searchr1_async.data.suites import find_overlap
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.reward import RecipeReward
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Emit, Notice
from searchr1_async.runs.checkpoints import ResumePoint
from searchr1_async.runs.folder import find_point
from searchr1_async.runs.rollouts import check_format
from searchr1_async.runs.spending import check_max_cost
from searchr1_async.runs.weights import model_name
from searchr1_async.service.connection import is_embedded
from searchr1_async.service.startup import billing_on
from searchr1_async.training.job import TrainingJob
from searchr1_async.training.start import Start, chosen_model, chosen_rank, find_start, resumed_start

_LONGEST = 120
"""Characters of a question shown in messages."""


def refuse_overlap(training: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Refuses held-out questions that are also trained on (``same`` of :func:`~searchr1_async.data.suites.find_overlap`)."""
    if not held_out:
        return
    # Equal questions have equal letters and digits: a fast filter before the exact comparison.
    texts = {_letters(question.question) for question in held_out}
    alike = [question for question in training if _letters(question.question) in texts]
    if not alike:
        return
    seen = find_overlap(alike, held_out).filter(pl.col("kind") == "same")
    if seen.height:
        first = seen.row(0, named=True)
        raise ConfigurationError(
            f"{seen.height} of {len(held_out)} held-out questions are also trained on; the first: "
            f"{_shown(first['question'])} (held out as {_shown(first['question_id'])}, trained on as "
            f"{_shown(first['training_id'])}). Remove them from one of the two."
        )


async def tell_near_overlap(training: Sequence[Question], held_out: Sequence[Question], emit: Emit) -> None:
    """Warns about held-out questions that are nearly the same as training questions."""
    if not held_out:
        return
    found = await anyio.to_thread.run_sync(find_overlap, training, held_out)
    near = found.filter(pl.col("kind") == "near")
    if near.height:
        first = near.row(0, named=True)
        emit(
            Notice(
                f"{near.height} of {len(held_out)} held-out questions are nearly the same as training questions; the first: "
                f"{_shown(first['question'])}, close to {_shown(first['training_question'])}",
                is_warning=True,
            )
        )


def _letters(question: str) -> str:
    folded = unicodedata.normalize("NFKC", question).casefold()
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", folded)))


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")


def training_job(given: Mapping[str, Any]) -> TrainingJob:
    """The job of a run, from the arguments of :func:`searchr1_async.train`, each already checked on its own.

    Reads the questions and small files of the given folders. Refuses contradictory arguments, and folders, runs or questions
    that cannot be used.
    """
    config: TrainConfig = given["config"] or TrainConfig()
    service, out_dir = given["service"], given["out_dir"]
    point = ResumePoint.load(out_dir) if given["resume"] else None
    questions = checked_questions(given["questions"])
    is_local = is_embedded(service)
    sizes = chosen_sizes(
        config.flat(), questions=len(questions), is_embedded=is_local, begun=None if point is None else point.settings
    )
    notes: tuple[str, ...] = ()
    if point is None and is_local and config.batch.groups_per_batch is None:
        notes = (f"the embedded service runs on this machine: sizes you do not set are a laptop's ({sizes})",)
    config = config.replace(**asdict(sizes), format=config.episode.format_name)
    _ = config.episode.limits  # checks them together
    check_format(config.episode.format_name)
    model = model_name(config.model.name, service)
    check_thinking(model, config.episode.renderer, config.episode.thinking)
    held_out = optional_questions(given["held_out"])
    if config.evaluation.evaluate_every is not None and not held_out:
        raise ConfigurationError("evaluate_every needs held_out questions to evaluate on")
    start = _find_start(config.learning.start_from, given, point)
    model = chosen_model(model, start)
    check_max_cost(config.cost.max_cost, billing_on(service, model, config.cost.price))
    job = settings_of(
        TrainingJob,
        given,
        config=config.replace(model=model, lora_rank=chosen_rank(config.learning.lora_rank, start)),
        questions=questions,
        reward=given["reward"] or settings_of(RecipeReward, config.flat()),
        held_out=held_out,
        start=start,
        notes=notes,
    )
    refuse_overlap(job.questions, job.held_out)
    find_point(out_dir, resume=job.resume)  # refuses a folder with a run that is not to be resumed
    return job


def _find_start(start_from: str | Path | None, given: Mapping[str, Any], point: ResumePoint | None) -> Start | None:
    if start_from is None:
        return None
    if point is not None:
        return resumed_start(start_from, point)
    return find_start(start_from, given["service"], given["out_dir"])
