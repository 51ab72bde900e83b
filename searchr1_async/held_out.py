"""Checks that training questions do not overlap with the held-out questions."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import anyio
import polars as pl

from searchr1_async.data.suites import find_overlap
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Emit, Notice

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
