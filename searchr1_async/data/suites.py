"""Suites: the questions that an evaluation asks, each with where it came from, so that another person can ask the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias, TypeGuard, cast

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.rows import TABLE_SUFFIXES
from searchr1_async.data.hub import SUITES
from searchr1_async.data.questions import (
    MEMORY,
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
"""All of :data:`~searchr1_async.data.hub.SUITES`."""
_RESERVED = frozenset({"all", "macro"})
"""Rows of an evaluation's summary."""


@dataclass(frozen=True, slots=True)
class Suite:
    """The questions of one suite, in the order in which they are asked.

    Raises:
        QuestionsError: no name, a reserved one, no questions, two of one id, one of another ``data_source``, or one without a
            golden answer.
    """

    name: str
    """Also the ``data_source`` of each of its questions: results are kept by it."""
    questions: tuple[Question, ...] = field(repr=False)
    """Those asked; ids are unique within the suite."""
    source: str = MEMORY
    """``"RUC-NLPIR/FlashRAG_datasets@<commit>/nq/test.jsonl"``, a file's absolute path, ``"atlas"`` or ``"memory"``. Where the
    suite is a part of it, ``#`` and the part's ``data_source`` follow. :func:`load_suite` reads it again, but for memory."""
    sha256: str | None = None
    """Of the file; None without one."""
    total: int = 0
    """Questions in the source (of the split), before ``limit``; 0 means as many as there are."""
    split: str | None = None
    limit: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or self.name in _RESERVED:
            raise QuestionsError(
                f"a suite cannot be called {self.name!r} (all and macro are rows of the summary): "
                "give it another name, {name: source}"
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
                    f"suite {self.name!r} holds question {question.id!r} of {question.data_source!r}: "
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
"""A name, a file, a table in memory, questions, or a suite that is ready."""
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
    """Reads one suite, whole and checked.

    Args:
        source: what :func:`~searchr1_async.load_questions` reads (a suite of FlashRAG, ``"nq"`` or ``"nq@<commit>"``,
            ``"org/name"`` on the hub, a file, ``"atlas"``, a frame or a list of dicts, questions), or the ``source`` of an
            earlier suite. A ready suite is taken as it is.
        name: what the suite, and each of its questions' ``data_source``, is called; None takes the one ``data_source`` of
            its rows, or the source's own name where they have several or none.
        split: as in :func:`~searchr1_async.load_questions`.
        limit: at most so many questions.
        seed: which ones, see :func:`~searchr1_async.data.questions.sampled`; None takes the first.
        sha256: what the file must be, 64 hexadecimal digits.

    Raises:
        QuestionsError: as :func:`~searchr1_async.load_questions`; another file than ``sha256`` says; a ready suite with
            another ``split``, ``limit`` or ``seed`` than its own.
    """
    check_sampling(limit, seed)
    if isinstance(source, Suite):
        return _ready(source, name, split, limit, seed)
    read = _read(source, split)
    if sha256 is not None and read.sha256 != sha256.lower():
        raise QuestionsError(
            f"{read.source} has the SHA-256 {read.sha256 or 'of no file'}, where {sha256} was asked for: "
            "it is not the file that was evaluated"
        )
    sources = {question.data_source for question in read.questions}
    own_name = sources.pop() if len(sources) == 1 else read.name
    return _suite(read, own_name if name is None else name, split=split, limit=limit, seed=seed)


def load_suites(
    sources: Suites, *, split: str | None = None, limit: int | None = None, seed: int | None = None
) -> tuple[Suite, ...]:
    """Reads several suites.

    A source whose rows name several ``data_source`` (the recipe's ``test.parquet``, the atlas) becomes one suite for each,
    called as it is, since their figures mean different things; a mapping's name keeps them together.

    Args:
        sources: one source of :func:`load_suite` or several; ``"benchmarks"`` for the seven of FlashRAG that the field
            reports (a folder of that name is ``"./benchmarks"``); a folder: its files that are named after these seven (``nq.jsonl``, ``nq/test.jsonl``), or every data file
            in it where there is none; ``{name: source}``.
        split: of every suite.
        limit: at most so many questions of each suite.
        seed: which ones; None takes the first.

    Raises:
        QuestionsError: as :func:`load_suite`; there are none; two have one name.
    """
    check_sampling(limit, seed)
    found: dict[str, Suite] = {}
    for suite in _each(sources, split, limit, seed):
        if other := found.get(suite.name):
            raise QuestionsError(
                f"two suites are called {suite.name!r} ({other.source} and {suite.source}): "
                "give them names of their own, {name: source}"
            )
        found[suite.name] = suite
    if not found:
        raise QuestionsError("there are no suites: name one, a file, 'atlas', or 'benchmarks' for all seven")
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class _Read:
    """Every question of a source."""

    questions: tuple[Question, ...]
    name: str
    source: str = MEMORY
    sha256: str | None = None
    split: str | None = None


def _each(sources: Suites, split: str | None, limit: int | None, seed: int | None) -> Iterator[Suite]:
    if isinstance(sources, Mapping):
        for name, source in cast("Mapping[str, SuiteSource]", sources).items():
            yield load_suite(source, name=name, split=split, limit=limit, seed=seed)
    elif isinstance(sources, Suite):
        yield load_suite(sources, split=split, limit=limit, seed=seed)
    elif isinstance(sources, str | Path):
        for name, source in _named(sources):
            yield from _parts(_read(source, split, name), split, limit, seed)
    elif _are_several(sources):
        for source in sources:
            yield from _each(source, split, limit, seed)
    else:
        yield from _parts(_read(cast(SuiteSource, sources), split), split, limit, seed)


def _are_several(sources: object) -> TypeGuard[Sequence[SuiteSource]]:
    """Whether they are sources, not questions or rows of one; of no kind at all, what reads them says so."""
    return isinstance(sources, Sequence) and not any(isinstance(item, Question | Mapping) for item in sources)


def _named(source: str | Path) -> Iterator[tuple[str | None, str | Path]]:
    """What a text or a path stands for; with a name where the file itself has none."""
    if source == BENCHMARKS:  # even where a folder is called so: what is asked must not depend on the current folder
        yield from ((None, name) for name in SUITES)
    elif str(source).strip() and (path := absolute_path(source, "suites")).is_dir():
        yield from _files(path)
    else:
        yield None, source


def _files(folder: Path) -> list[tuple[str | None, str | Path]]:
    """A folder's suites: in the order of the field's seven, else by name."""
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
            logger.info("%s: not suites of the field, and passed over: %s", folder, ", ".join(others))
        return found
    if not files:
        raise QuestionsError(f"the folder {folder} holds no question files (*.jsonl, *.jsonl.gz, *.parquet)")
    return [(None, path) for path in files]


def _read(source: SuiteSource, split: str | None, name: str | None = None) -> _Read:
    if isinstance(source, str | Path):
        return _read_named(source, split, name)
    read: ReadQuestions = read_questions(cast(Questions, source), split)
    return _Read(read.questions, read.name, split=split)


def _read_named(source: str | Path, split: str | None, name: str | None) -> _Read:
    text, part = str(source), ""
    if "#" in text and not absolute_path(text, "suites").exists():
        text, _, part = text.rpartition("#")
    read = read_questions(text if part else source, split)
    questions = tuple(question for question in read.questions if not part or question.data_source == part)
    if not questions:
        raise QuestionsError(f"{text} holds no questions with the data_source {part!r}")
    if name is not None:  # a file such as nq/test.jsonl, which is called after its split
        stem = read.name
        questions = tuple(replace(q, data_source=name) if q.data_source == stem else q for q in questions)
    digest = None
    if read.path is not None:
        with read.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = f"{read.source}#{part}" if part else read.source
    return _Read(questions, name or part or read.name, origin, digest, read.split)


def _parts(read: _Read, split: str | None, limit: int | None, seed: int | None) -> Iterator[Suite]:
    by_source: dict[str, list[Question]] = {}
    for question in read.questions:
        by_source.setdefault(question.data_source, []).append(question)
    ranks = {name: rank for rank, name in enumerate(SUITES)}
    for name, questions in sorted(by_source.items(), key=lambda item: (ranks.get(item[0], len(ranks)), item[0])):
        is_part = len(by_source) > 1 and read.source != MEMORY
        part = replace(read, questions=tuple(questions), source=f"{read.source}#{name}" if is_part else read.source)
        yield _suite(part, name, split=split, limit=limit, seed=seed)


def _suite(read: _Read, name: str, *, split: str | None, limit: int | None, seed: int | None) -> Suite:
    chosen = tuple(
        question if question.data_source == name else replace(question, data_source=name)
        for question in sampled(read.questions, limit, seed)
    )
    return Suite(name, chosen, read.source, read.sha256, len(read.questions), read.split or split, limit, seed)


def _ready(suite: Suite, name: str | None, split: str | None, limit: int | None, seed: int | None) -> Suite:
    for asked, own, word in ((split, suite.split, "split"), (limit, suite.limit, "limit"), (seed, suite.seed, "seed")):
        if asked is not None and asked != own:
            raise QuestionsError(
                f"suite {suite.name!r} was loaded with {word}={own!r}, and {word}={asked!r} is asked for: "
                "choose it where the suite is loaded"
            )
    if name is None or name == suite.name:
        return suite
    questions = tuple(replace(question, data_source=name) for question in suite.questions)
    return replace(suite, name=name, questions=questions)
