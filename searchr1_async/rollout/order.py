"""Order of the questions: one stream of places over all epochs, each epoch shuffled with the seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

from searchr1_async.episodes.types import Question
from searchr1_async.errors import QuestionsError


class QuestionOrder:
    """Maps places (0, 1, 2, … over the whole run) to questions.

    A resume point and a sampling seed depend on a question only through its place.

    Raises:
        QuestionsError: there are no questions, or two share an id.
    """

    def __init__(self, questions: Sequence[Question], *, seed: int) -> None:
        if not questions:
            raise QuestionsError("there are no questions to train on")
        seen: set[str] = set()
        for question in questions:
            if question.id in seen:
                raise QuestionsError(f"two questions have the id {question.id!r}: ids must be unique")
            seen.add(question.id)
        self._questions = tuple(questions)
        self._seed = seed
        # Two, since groups of one epoch may still be running when the next begins.
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        """Questions per epoch."""
        return len(self._questions)

    @property
    def fingerprint(self) -> str:
        """Changes with any question's id or position and with the seed: a resume point is valid for one order only."""
        digest = hashlib.sha256(str(self._seed).encode())
        for question in self._questions:
            digest.update(b"\0" + question.id.encode("utf-8", "replace"))
        return digest.hexdigest()[:16]

    def question(self, place: int) -> Question:
        epoch, offset = divmod(place, len(self._questions))
        return self._shuffled(epoch)[offset]

    def _shuffle(self, epoch: int) -> tuple[Question, ...]:
        questions = list(self._questions)
        random.Random(f"{self._seed}/{epoch}").shuffle(questions)
        return tuple(questions)
