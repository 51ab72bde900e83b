"""Evaluation suites: questions with their provenance, so that others can ask the same ones; and their overlap with training."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.tables import TABLE_SUFFIXES
from searchr1_async.data.hub import SUITES
from searchr1_async.data.questions import MEMORY, Questions, ReadQuestions, check_sampling, read_questions, sampled
from searchr1_async.episodes.types import Question
from searchr1_async.errors import QuestionsError

BENCHMARKS = "benchmarks"
"""All of :data:`~searchr1_async.data.hub.SUITES`."""
_RESERVED = frozenset({"all", "macro"})
"""Reserved for rows of an evaluation's summary."""
_OVERLAP = ("suite", "question_id", "question", "training_source", "training_id", "training_question")
OVERLAP_SCHEMA = pl.Schema(dict.fromkeys(_OVERLAP, pl.String))


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
        for question in self.questions:
            question.check_scorable()
            if question.data_source != self.name:
                raise QuestionsError(
                    f"suite {self.name!r} contains question {question.id!r} of {question.data_source!r}: "
                    "make suites with load_suite(questions, name=…)"
                )
        ((found, times),) = Counter([question.id for question in self.questions]).most_common(1)
        if times > 1:
            raise QuestionsError(
                f"suite {self.name!r} ({self.source}) has two questions with the id {found!r}: make ids unique"
            )

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
        source: anything :func:`~searchr1_async.load_questions` reads, the ``source`` of an earlier suite, or a loaded suite.
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
        return _renamed(source, name, split=split, limit=limit, seed=seed)
    read = _read(source, split)
    digest = _sha256(read)
    if sha256 is not None and digest != sha256.lower():
        raise QuestionsError(
            f"{read.source} has the SHA-256 {digest or 'of no file'}, expected {sha256}: "
            "it is not the file that was evaluated"
        )
    sources = {question.data_source for question in read.questions}
    return _suite(read, digest, name or (sources.pop() if len(sources) == 1 else read.name), limit, seed)


def load_suites(
    sources: Suites, *, split: str | None = None, limit: int | None = None, seed: int | None = None
) -> tuple[Suite, ...]:
    """Reads several suites; ``split``, ``limit`` and ``seed`` as of :func:`load_suite`, for each.

    A source with several ``data_source`` values (the recipe's ``test.parquet``, the atlas) becomes one suite per value, since their
    results are not comparable; a name given by a mapping keeps them together.

    Args:
        sources: one or several sources of :func:`load_suite`; ``"benchmarks"`` for FlashRAG's seven standard suites (use
            ``"./benchmarks"`` for a folder of that name); a folder, for its files named after these seven (``nq.jsonl``), or else
            all its data files; or ``{name: source}``.

    Raises:
        QuestionsError: see :func:`load_suite`; there are no suites, or two have the same name.
    """
    check_sampling(limit, seed)
    found: dict[str, Suite] = {}
    for suite in _each(sources, split, limit, seed):
        if (other := found.setdefault(suite.name, suite)) is not suite:
            raise QuestionsError(
                f"two suites are called {suite.name!r} ({other.source} and {suite.source}): "
                "give them different names, {name: source}"
            )
    if not found:
        raise QuestionsError("there are no suites: pass a name, a file, 'atlas', or 'benchmarks' for all seven")
    return tuple(found.values())


def _each(sources: Any, split: str | None, limit: int | None, seed: int | None) -> Iterator[Suite]:
    if isinstance(sources, Mapping):
        for name, source in sources.items():
            yield load_suite(source, name=name, split=split, limit=limit, seed=seed)
    elif isinstance(sources, Suite):
        yield load_suite(sources, split=split, limit=limit, seed=seed)
    elif isinstance(sources, str | Path):
        for source in _named(sources):
            yield from _parts(_read(source, split), limit, seed)
    elif isinstance(sources, Sequence) and not any(isinstance(item, Question | Mapping) for item in sources):
        for source in sources:
            yield from _each(source, split, limit, seed)
    else:  # the questions or rows of one source
        yield from _parts(_read(sources, split), limit, seed)


def _named(source: str | Path) -> Iterable[str | Path]:
    """The sources that a text or path names; of a folder, the standard seven in order, else all data files by name."""
    if source == BENCHMARKS:  # even if such a folder exists: the meaning must not depend on the current folder
        return SUITES
    if not str(source).strip() or not (folder := absolute_path(source, "suites")).is_dir():
        return [source]
    files = sorted(path for path in folder.iterdir() if path.name.endswith(TABLE_SUFFIXES) and path.name[0] != ".")
    if not files:
        raise QuestionsError(f"the folder {folder} holds no question files (*.jsonl, *.jsonl.gz, *.parquet)")
    return [path for name in SUITES for path in files if path.name.split(".")[0] == name] or files


def _read(source: Questions, split: str | None) -> ReadQuestions:
    """The questions of a source, or of the part that ``#<data_source>`` names."""
    text, _, part = str(source).rpartition("#") if isinstance(source, str | Path) else ("", "", "")
    if not text or absolute_path(str(source), "suites").exists():
        return read_questions(source, split)
    read = read_questions(text, split)
    questions = tuple(question for question in read.questions if question.data_source == part)
    if not questions:
        raise QuestionsError(f"{text} has no questions with the data_source {part!r}")
    return replace(read, questions=questions, name=part, source=f"{read.source}#{part}")


def _sha256(read: ReadQuestions) -> str | None:
    if read.path is None:
        return None
    with read.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts(read: ReadQuestions, limit: int | None, seed: int | None) -> Iterator[Suite]:
    by_source: dict[str, list[Question]] = {}
    for question in read.questions:
        by_source.setdefault(question.data_source, []).append(question)
    standard, digest = [name for name in SUITES if name in by_source], _sha256(read)
    for name in (*standard, *sorted(by_source.keys() - SUITES.keys())):
        is_part = len(by_source) > 1 and read.source != MEMORY
        source = f"{read.source}#{name}" if is_part else read.source
        yield _suite(replace(read, questions=tuple(by_source[name]), source=source), digest, name, limit, seed)


def _suite(read: ReadQuestions, digest: str | None, name: str, limit: int | None, seed: int | None) -> Suite:
    chosen = _with_data_source(sampled(read.questions, limit, seed), name)
    return Suite(name, chosen, read.source, digest, len(read.questions), read.split, limit, seed)


def _renamed(suite: Suite, name: str | None, **sampling: Any) -> Suite:
    """A loaded suite, under another name if one is given; never sampled again."""
    for word, asked in sampling.items():
        if asked is not None and asked != getattr(suite, word):
            raise QuestionsError(
                f"suite {suite.name!r} was loaded with {word}={getattr(suite, word)!r}, but {word}={asked!r} was requested: "
                "set it where the suite is loaded"
            )
    if name in (None, suite.name):
        return suite
    return replace(suite, name=name, questions=_with_data_source(suite.questions, name))


def _with_data_source(questions: Iterable[Question], name: str) -> tuple[Question, ...]:
    return tuple(each if each.data_source == name else replace(each, data_source=name) for each in questions)


def find_overlap(training: Iterable[Question], asked: Iterable[Question]) -> pl.DataFrame:
    """The asked questions that are also in training (:data:`OVERLAP_SCHEMA`); case, punctuation and Unicode form do not count."""
    trained: dict[str, Question] = {}
    for question in training:
        trained.setdefault(_key(question.question), question)
    trained.pop("", None)
    rows = [
        (each.data_source, each.id, each.question, same.data_source, same.id, same.question)
        for each in asked
        if (same := trained.get(_key(each.question)))
    ]
    return pl.DataFrame(rows, schema=OVERLAP_SCHEMA, orient="row")


def _key(text: str) -> str:
    """The text, normalised for the comparison. Symbols stay: they distinguish C from C++."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(sign for sign in folded if unicodedata.category(sign)[0] in "LMNS")
