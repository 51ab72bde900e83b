"""Evaluation suites: questions with their provenance, so that others can ask the same ones; and their overlap with training."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias, TypeGuard, cast

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.tables import TABLE_SUFFIXES
from searchr1_async.data.questions import (
    MEMORY,
    SUITES,
    Questions,
    ReadQuestions,
    check_sampling,
    read_questions,
    sampled,
)
from searchr1_async.episodes.types import Question
from searchr1_async.errors import QuestionsError

logger = logging.getLogger(__name__)

BENCHMARKS = "benchmarks"
"""All of :data:`~searchr1_async.data.questions.SUITES`."""
_RESERVED = frozenset({"all", "macro"})
"""Reserved for rows of an evaluation's summary."""
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


@dataclass(frozen=True, slots=True)
class Suite:
    """The questions of one suite, in evaluation order.

    Raises:
        QuestionsError: no or a reserved name, no questions, duplicate ids, or a question of another ``data_source`` or without a
            golden answer.
    """

    name: str
    """Also the ``data_source`` of all its questions, which keys the results."""
    questions: tuple[Question, ...] = field(repr=False)
    """The questions asked; ids are unique within the suite."""
    source: str = MEMORY
    """``"RUC-NLPIR/FlashRAG_datasets@<commit>/nq/test.jsonl"``, a file's absolute path, ``"atlas"`` or ``"memory"``; with
    ``#<data_source>`` for a part of it. :func:`load_suite` can read it again, except memory."""
    sha256: str | None = None
    """SHA-256 of the file, if any."""
    total: int = 0
    """Questions in the source (and split) before ``limit``; 0 means ``len(questions)``."""
    split: str | None = None
    limit: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or self.name in _RESERVED:
            raise QuestionsError(
                f"a suite cannot be called {self.name!r} (all and macro are rows of the summary): "
                "use another name, {name: source}"
            )
        if not self.questions:
            raise QuestionsError(f"suite {self.name!r} has no questions")
        if not self.total:
            object.__setattr__(self, "total", len(self.questions))
        seen: set[str] = set()
        for question in self.questions:
            question.check_scorable()
            if question.data_source != self.name:
                raise QuestionsError(
                    f"suite {self.name!r} contains question {question.id!r} of {question.data_source!r}: "
                    "make suites with load_suite(questions, name=…)"
                )
            if question.id in seen:
                raise QuestionsError(
                    f"suite {self.name!r} ({self.source}) has two questions with the id {question.id!r}: make ids unique"
                )
            seen.add(question.id)

    def __len__(self) -> int:
        return len(self.questions)


SuiteSource: TypeAlias = Questions | Suite
"""A name, a file, an in-memory table, questions, or a loaded suite."""
Suites: TypeAlias = SuiteSource | Sequence[SuiteSource] | Mapping[str, SuiteSource]
"""One or several; a mapping gives them names."""


def load_suite(
    source: SuiteSource,
    *,
    name: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    sha256: str | None = None,
) -> Suite:
    """Reads and checks one suite.

    Args:
        source: anything :func:`~searchr1_async.load_questions` reads (a FlashRAG suite, ``"nq"`` or ``"nq@<commit>"``,
            ``"org/name"`` on the hub, a file, ``"atlas"``, a frame or a list of dicts, questions), the ``source`` of an
            earlier suite, or a loaded suite.
        name: name of the suite and ``data_source`` of its questions; None takes the ``data_source`` of its rows, or the source's
            name if they have several or none.
        split: see :func:`~searchr1_async.load_questions`.
        limit: maximum number of questions.
        seed: seed of the sample, see :func:`~searchr1_async.data.questions.sampled`; None takes the first questions.
        sha256: expected SHA-256 of the file, 64 hexadecimal digits.

    Raises:
        QuestionsError: see :func:`~searchr1_async.load_questions`; the file does not match ``sha256``; a loaded suite has
            another ``split``, ``limit`` or ``seed``.
    """
    check_sampling(limit, seed)
    if isinstance(source, Suite):
        return _ready(source, name, split, limit, seed)
    read = _read(source, split)
    digest = _sha256(read)
    if sha256 is not None and digest != sha256.lower():
        raise QuestionsError(
            f"{read.source} has the SHA-256 {digest or 'of no file'}, expected {sha256}: "
            "it is not the file that was evaluated"
        )
    sources = {question.data_source for question in read.questions}
    own_name = sources.pop() if len(sources) == 1 else read.name
    return _suite(read, digest, own_name if name is None else name, limit, seed)


def load_suites(
    sources: Suites, *, split: str | None = None, limit: int | None = None, seed: int | None = None
) -> tuple[Suite, ...]:
    """Reads several suites.

    A source with several ``data_source`` values (the recipe's ``test.parquet``, the atlas) becomes one suite per value, since their
    results are not comparable; a name given by a mapping keeps them together.

    Args:
        sources: one or several sources of :func:`load_suite`; ``"benchmarks"`` for FlashRAG's seven standard suites (use
            ``"./benchmarks"`` for a folder of that name); a folder, for its files named after these seven (``nq.jsonl``,
            ``nq/test.jsonl``), or else all its data files; or ``{name: source}``.
        split: split of every suite.
        limit: maximum number of questions per suite.
        seed: seed of the samples; None takes the first questions.

    Raises:
        QuestionsError: see :func:`load_suite`; there are no suites, or two have the same name.
    """
    check_sampling(limit, seed)
    found: dict[str, Suite] = {}
    for suite in _each(sources, split, limit, seed):
        if other := found.get(suite.name):
            raise QuestionsError(
                f"two suites are called {suite.name!r} ({other.source} and {suite.source}): "
                "give them different names, {name: source}"
            )
        found[suite.name] = suite
    if not found:
        raise QuestionsError("there are no suites: pass a name, a file, 'atlas', or 'benchmarks' for all seven")
    return tuple(found.values())


def _each(sources: Suites, split: str | None, limit: int | None, seed: int | None) -> Iterator[Suite]:
    if isinstance(sources, Mapping):
        for name, source in cast("Mapping[str, SuiteSource]", sources).items():
            yield load_suite(source, name=name, split=split, limit=limit, seed=seed)
    elif isinstance(sources, Suite):
        yield load_suite(sources, split=split, limit=limit, seed=seed)
    elif isinstance(sources, str | Path):
        for name, source in _named(sources):
            yield from _parts(_read(source, split, name), limit, seed)
    elif _are_several(sources):
        for source in sources:
            yield from _each(source, split, limit, seed)
    else:
        yield from _parts(_read(cast(SuiteSource, sources), split), limit, seed)


def _are_several(sources: object) -> TypeGuard[Sequence[SuiteSource]]:
    """Whether it is a sequence of sources, rather than of questions or rows of one source."""
    return isinstance(sources, Sequence) and not any(isinstance(item, Question | Mapping) for item in sources)


def _named(source: str | Path) -> Iterator[tuple[str | None, str | Path]]:
    """Sources that a text or path names, each with a suite name if the file has none."""
    if source == BENCHMARKS:  # even if such a folder exists: the meaning must not depend on the current folder
        yield from ((None, name) for name in SUITES)
    elif str(source).strip() and (path := absolute_path(source, "suites")).is_dir():
        yield from _files(path)
    else:
        yield None, source


def _files(folder: Path) -> list[tuple[str | None, str | Path]]:
    """A folder's suites: the standard seven in order, else all data files by name."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name.endswith(TABLE_SUFFIXES) and path.name[0] != "."
    )
    found: list[tuple[str | None, str | Path]] = []
    for name, usual in SUITES.items():
        found += [(None, path) for path in files if path.name.split(".")[0] == name]
        nested = (folder / name / f"{usual}{suffix}" for suffix in TABLE_SUFFIXES)
        found += [(name, path) for path in nested if path.is_file()]
    if found:
        taken = {path for _, path in found}
        if others := [path.name for path in files if path not in taken]:
            logger.info("%s: skipping files that are not standard suites: %s", folder, ", ".join(others))
        return found
    if not files:
        raise QuestionsError(f"the folder {folder} holds no question files (*.jsonl, *.jsonl.gz, *.parquet)")
    return [(None, path) for path in files]


def _read(source: SuiteSource, split: str | None, name: str | None = None) -> ReadQuestions:
    if not isinstance(source, str | Path):
        return read_questions(cast(Questions, source), split)
    text, part = str(source), ""
    if "#" in text and not absolute_path(text, "suites").exists():
        text, _, part = text.rpartition("#")
    read = read_questions(text if part else source, split)
    questions = tuple(question for question in read.questions if not part or question.data_source == part)
    if not questions:
        raise QuestionsError(f"{text} has no questions with the data_source {part!r}")
    if name is not None:  # a file such as nq/test.jsonl, whose own name is the split
        stem = read.name
        questions = tuple(replace(q, data_source=name) if q.data_source == stem else q for q in questions)
    origin = f"{read.source}#{part}" if part else read.source
    return replace(read, questions=questions, name=name or part or read.name, source=origin)


def _sha256(read: ReadQuestions) -> str | None:
    if read.path is None:
        return None
    with read.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts(read: ReadQuestions, limit: int | None, seed: int | None) -> Iterator[Suite]:
    by_source: dict[str, list[Question]] = {}
    for question in read.questions:
        by_source.setdefault(question.data_source, []).append(question)
    ranks, digest = {name: rank for rank, name in enumerate(SUITES)}, _sha256(read)
    for name, questions in sorted(by_source.items(), key=lambda item: (ranks.get(item[0], len(ranks)), item[0])):
        is_part = len(by_source) > 1 and read.source != MEMORY
        part = replace(read, questions=tuple(questions), source=f"{read.source}#{name}" if is_part else read.source)
        yield _suite(part, digest, name, limit, seed)


def _suite(read: ReadQuestions, digest: str | None, name: str, limit: int | None, seed: int | None) -> Suite:
    chosen = tuple(
        question if question.data_source == name else replace(question, data_source=name)
        for question in sampled(read.questions, limit, seed)
    )
    return Suite(name, chosen, read.source, digest, len(read.questions), read.split, limit, seed)


def _ready(suite: Suite, name: str | None, split: str | None, limit: int | None, seed: int | None) -> Suite:
    for asked, own, word in ((split, suite.split, "split"), (limit, suite.limit, "limit"), (seed, suite.seed, "seed")):
        if asked is not None and asked != own:
            raise QuestionsError(
                f"suite {suite.name!r} was loaded with {word}={own!r}, but {word}={asked!r} was requested: "
                "set it where the suite is loaded"
            )
    if name is None or name == suite.name:
        return suite
    questions = tuple(replace(question, data_source=name) for question in suite.questions)
    return replace(suite, name=name, questions=questions)


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
