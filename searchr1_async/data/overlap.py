"""Questions that a model was trained on and is then evaluated on."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import polars as pl

from searchr1_async.episodes.types import Question

NEAR = 0.8
"""Of the words of both questions, weighed by how rare they are, at least so much is common to them."""

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
"""Sums of the same weights in another order differ by rounding; without it, a pair that lies exactly at the limit may be lost."""


def find_overlap(training: Iterable[Question], asked: Iterable[Question]) -> pl.DataFrame:
    """The asked questions that training holds too, one row each with the training question that is closest to it.

    ``kind`` is ``"same"`` where nothing but case, punctuation, white space and Unicode form tells them apart, and ``"near"``
    where they have nearly the same words: a Jaccard index of the word sets of at least :data:`NEAR`, each word weighed by its
    inverse document frequency. Near pairs are candidates for a look: they hold rephrased questions and misspellings, and also
    questions that differ by one common word ("born later", "died first"). Plain Jaccard will not do: questions made from a
    template differ in one rare word of ten, which is all that is asked. Of the atlas's held-out questions it takes 1,057 of
    1,832 for trained ones; weighed, it is 11 (Sudan for South Sudan, and a template so seldom used that its words are rare as well).

    Exhaustive, through an inverted index of each question's rarest words: 170,000 training questions against 50,000 take 9 s
    on one core and 0.9 GB. Run it in a thread.

    Returns:
        :data:`OVERLAP_SCHEMA`, in the order of ``asked``; the two sides are told apart by suite and id.
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
    """For ``str.translate``: drops punctuation, white space and invisible marks. Symbols stay, so that C and C++ are two."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        self[code] = chr(code) if category[0] in "LMN" or category in ("Sm", "Sc", "So") else None
        return self[code]


_IGNORED = _Ignored()


def _key(text: str) -> str:
    """The text, as far as it tells questions apart."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_IGNORED)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class _NearIndex:
    """For each asked question, the training question with the most words in common.

    Words are numbered from the rarest on. Two sets that have at least ``NEAR`` of the larger one's weight in common share one
    of the words that stand in both before the last ``NEAR`` of its weight: only these few rare words are indexed and looked up
    (prefix filtering; Chaudhuri et al., 2006, "A Primitive Operator for Similarity Joins in Data Cleaning").
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
        """The first of the closest training questions; None where none is near."""
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
        """The rarest words up to where what is left weighs too little to be a near question's whole share."""
        left = total
        for count, word in enumerate(words):
            if left < (NEAR - _SLACK) * total:
                return words[:count]
            left -= self._weights[word]
        return words
