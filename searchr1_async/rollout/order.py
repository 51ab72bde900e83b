"""In which order questions are trained on: shuffled once an epoch with the seed, known from the position alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

from searchr1_async.episodes.types import Question
from searchr1_async.errors import QuestionsError


class QuestionOrder:
    """All batches of a run. A batch never crosses the end of an epoch, and an epoch's last, smaller batch is played too.

    Raises:
        QuestionsError: no questions, or two with one id (a resume point names questions by id).
    """

    def __init__(self, questions: Sequence[Question], *, seed: int, groups_per_batch: int) -> None:
        if not questions:
            raise QuestionsError("there are no questions to train on")
        seen: set[str] = set()
        for question in questions:
            if question.id in seen:
                raise QuestionsError(f"two questions have the id {question.id!r}: ids must be unique")
            seen.add(question.id)
        self._questions = tuple(questions)
        self._seed = seed
        self._size = groups_per_batch
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    @property
    def fingerprint(self) -> str:
        """Changes with any question's id or place, and with the seed: a resume point is good for one order only."""
        digest = hashlib.sha256(str(self._seed).encode())
        for question in self._questions:
            digest.update(b"\0" + question.id.encode("utf-8", "replace"))
        return digest.hexdigest()[:16]

    def steps(self, epochs: int) -> int:
        """Batches in ``epochs`` epochs."""
        return epochs * -(-len(self._questions) // self._size)

    def batch(self, position: int) -> tuple[Question, ...]:
        """The batch that begins after ``position`` questions were consumed (counted over all epochs)."""
        epoch, offset = divmod(position, len(self._questions))
        return self._shuffled(epoch)[offset : offset + self._size]

    def _shuffle(self, epoch: int) -> tuple[Question, ...]:
        questions = list(self._questions)
        random.Random(f"{self._seed}/{epoch}").shuffle(questions)
        return tuple(questions)
