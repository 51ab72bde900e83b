"""Finds evaluation questions that were also trained on."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import polars as pl

from searchr1_async.episodes.types import Question

NEAR = 0.8
"""Minimum weighted Jaccard similarity of two near questions."""

OVERLAP_SCHEMA = pl.Schema(
    {
        "suite": pl.String,
        "question_id": pl.String,
        "question": pl.String,
        "training_source": pl.String,
        "training_id": pl.String,
        "training_question": pl.String,
        "kind": pl.String,
    }
)

_WORD = re.compile(r"[^\W_]+")
_SLACK = 1e-9
"""Tolerance for rounding of sums in another order, for pairs exactly at the limit."""


def find_overlap(training: Iterable[Question], asked: Iterable[Question]) -> pl.DataFrame:
    """The asked questions that are also in training, one row each with the closest training question.

    ``kind`` is ``"same"`` if the questions differ only in case, punctuation, white space and Unicode form, and ``"near"`` if the
    Jaccard index of their word sets, weighted by inverse document frequency, is at least :data:`NEAR`. Unweighted Jaccard would match
    template questions that differ in one rare, decisive word. Review near pairs: they include rephrasings and misspellings, but
    also questions that differ in one common word ("born later", "died first").

    Exhaustive, and slow for large suites: call it in a thread.

    Returns:
        A frame with :data:`OVERLAP_SCHEMA`, in the order of ``asked``.
    """
    trained, questions = tuple(training), tuple(asked)
    keys = [_key(question.question) for question in trained]
    first_of = {key: place for place, key in reversed(list(enumerate(keys))) if key}
    index = _NearIndex([question.question for question in trained], [question.question for question in questions])
    rows: list[tuple[str, ...]] = []
    for place, question in enumerate(questions):
        same = first_of.get(_key(question.question))
        closest = index.closest(place) if same is None else same
        if closest is not None:
            of = trained[closest]
            kind = "near" if same is None else "same"
            asked_row = (question.data_source, question.id, question.question)
            rows.append((*asked_row, of.data_source, of.id, of.question, kind))
    return pl.DataFrame(rows, schema=OVERLAP_SCHEMA, orient="row")


class _Ignored(dict[int, str | None]):
    """For ``str.translate``: drops punctuation, white space and invisible marks. Keeps symbols, which distinguish C from C++."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        self[code] = chr(code) if category[0] in "LMN" or category in ("Sm", "Sc", "So") else None
        return self[code]


_IGNORED = _Ignored()


def _key(text: str) -> str:
    """The text, normalised for the comparison."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_IGNORED)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class _NearIndex:
    """Finds the most similar training question of each asked question.

    Words are numbered from the rarest. Sets that share ``NEAR`` of the larger one's weight share a word of their prefixes, so only
    these few rare words are indexed (prefix filtering; Chaudhuri et al., 2006, "A Primitive Operator for Similarity Joins in Data
    Cleaning").
    """

    def __init__(self, training: Sequence[str], asked: Sequence[str]) -> None:
        sets = [_words(text) for text in (*training, *asked)]
        counts = Counter(word for words in sets for word in words)
        number_of = {word: number for number, word in enumerate(sorted(counts, key=lambda word: (counts[word], word)))}
        self._weights = [math.log1p(len(sets) / counts[word]) for word in number_of]
        numbered = [sorted(number_of[word] for word in words) for words in sets]
        self._training, self._asked = numbered[: len(training)], numbered[len(training) :]
        self._totals = [self._weight(words) for words in self._training]
        self._by_word: dict[int, list[int]] = {}
        for place, words in enumerate(self._training):
            for word in self._prefix(words, self._totals[place]):
                self._by_word.setdefault(word, []).append(place)

    def closest(self, asked: int) -> int | None:
        """The first of the most similar training questions; None if none is near."""
        words = self._asked[asked]
        total = self._weight(words)
        own = set(words)
        best, closest = NEAR - _SLACK, None
        for place in sorted({p for word in self._prefix(words, total) for p in self._by_word.get(word, ())}):
            other = self._totals[place]
            if min(total, other) < (best - _SLACK) * max(total, other):
                continue
            common = self._weight(own.intersection(self._training[place]))
            similarity = common / (total + other - common)
            if similarity > best + _SLACK or (closest is None and similarity >= best):
                best, closest = similarity, place
        return closest

    def _weight(self, words: Iterable[int]) -> float:
        return sum(self._weights[word] for word in words)

    def _prefix(self, words: Sequence[int], total: float) -> Sequence[int]:
        """The rarest words, up to where the rest weighs too little for a near match."""
        left = total
        for count, word in enumerate(words):
            if left < (NEAR - _SLACK) * total:
                return words[:count]
            left -= self._weights[word]
        return words
