"""Question suites: the built-in one, files, and the data sets of the field on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.rows import (
    FORMATS,
    ArrowTable,
    Columns,
    MemoryRows,
    Row,
    UnreadableFileError,
    is_data_file,
    read_rows,
    renamed,
)
from searchr1_async.boundary.values import as_integer
from searchr1_async.data.hub import SUITES, fetch_questions_file, read_reference, split_of
from searchr1_async.data.layouts import QUESTION_COLUMNS, LayoutError, question_of
from searchr1_async.episodes.reward import normalize_answer
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, CorpusError, QuestionsError

logger = logging.getLogger(__name__)

Questions: TypeAlias = str | Path | Iterable[Question] | Iterable[Mapping[str, Any]] | ArrowTable
"""A suite's name, a file, questions, or a table in memory; see :func:`load_questions`."""

MEMORY = "memory"
"""The source of questions that came from no file."""
TABLE = "table"
"""What rows in memory are called that do not say it themselves. The same for every container: ids that are made from the content
hold it, and a run that was begun with a frame may go on with a list."""
ATLAS_SPLITS = ("train", "held_out")


def load_questions(
    name_or_path: Questions,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    columns: Columns | None = None,
) -> tuple[Question, ...]:
    """Reads a question suite, whole and checked, before any work starts.

    Args:
        name_or_path: ``"atlas"`` (built in); a JSONL, JSON, CSV, TSV (each also with ``.gz``) or Parquet file; a suite of
            FlashRAG (``"nq"``, ``"triviaqa"``, ``"popqa"``, ``"hotpotqa"``, ``"2wikimultihopqa"``, ``"musique"``,
            ``"bamboogle"``) or any data set ``"org/name"`` on the Hugging Face hub, of a certain revision with
            ``"nq@<commit>"``. A file wins over a name. Or a table in memory: a frame of polars or pandas, a
            ``datasets.Dataset``, a list with a dict for each row, or questions.
            Rows hold ``question`` and golden answers, in ``golden_answers``, ``answers``, ``answer``, ``possible_answers`` or
            ``reward_model.ground_truth`` and in any of the layouts of :mod:`~searchr1_async.data.layouts`; they may hold ``id``
            and ``data_source``. The other columns become ``metadata``.
        split: ``"train"`` or ``"held_out"`` of the atlas; the file of that name on the hub; in rows, those whose column
            ``split`` says so. None takes every row (on the hub: the suite's usual split).
        limit: at most so many questions, the first ones (of the seed's order, with a seed).
        seed: orders by it, see :func:`sampled`; None keeps the suite's own order.
        columns: what the source calls its columns, ``{"question": "q", "golden_answers": "answer"}``.

    Raises:
        QuestionsError: unknown name, unreadable or empty file, missing column, a question whose golden answers are missing or
            have no one meaning, duplicate ids, an unknown split, or a hub that does not answer: each with the place and the
            remedy.
    """
    check_sampling(limit, seed)
    questions = read_questions(name_or_path, split, columns).questions
    counts = Counter([question.id for question in questions])
    if len(counts) < len(questions):
        raise QuestionsError(f"two questions have the id {counts.most_common(1)[0][0]!r}: ids must be unique")
    return sampled(questions, limit, seed)


def check_sampling(limit: int | None, seed: int | None) -> None:
    """Refuses a limit or a seed that is no whole number, and a limit below 1, before anything is read.

    Raises:
        QuestionsError: naming it.
    """
    try:
        if limit is not None:
            as_integer("limit", limit, at_least=1)
        if seed is not None:
            as_integer("seed", seed)
    except ConfigurationError as error:
        raise QuestionsError(f"{error}, or None") from None


def sampled(questions: Sequence[Question], limit: int | None, seed: int | None) -> tuple[Question, ...]:
    """The first ``limit`` questions; with a seed, in the order of SHA-256 of ``"<seed>/<id>"``.

    So one seed takes the same questions on every machine, in every version of Python and whatever the order of the file;
    a larger limit takes those of a smaller one and more behind them; and a question that is added or taken away moves no
    other. Ids are unique, so no two questions share a place.
    """
    if seed is not None:
        questions = sorted(questions, key=lambda question: _place(seed, question.id))
    return tuple(questions[:limit])


def _place(seed: int, question_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{question_id}".encode("utf-8", "surrogatepass")).digest()


def checked_questions(questions: Questions) -> tuple[Question, ...]:
    """The questions, read where they are named or rows of a table.

    Raises:
        QuestionsError: as :func:`load_questions`.
    """
    return load_questions(questions)


def optional_questions(questions: Questions | None) -> tuple[Question, ...]:
    """As :func:`checked_questions`; none where nothing is given, which is None or an empty list.

    Raises:
        QuestionsError: as :func:`load_questions`.
    """
    if questions is None or (isinstance(questions, str | Sequence) and not questions):
        return ()
    return checked_questions(questions)


@dataclass(frozen=True, slots=True)
class ReadQuestions:
    """Every question of a source (of its split), and where they came from."""

    questions: tuple[Question, ...]
    name: str
    """What the source is called, where its rows say nothing of it."""
    source: str
    """``"atlas"``, the file's absolute path, or the hub's ``org/name@<commit>/<file>``; :func:`read_questions` reads it again.
    :data:`MEMORY` for what came from no file."""
    path: Path | None = None
    """The file."""
    split: str | None = None
    """The split asked for; on the hub always the one that was read."""


def read_questions(source: Questions, split: str | None = None, columns: Columns | None = None) -> ReadQuestions:
    """As :func:`load_questions`, whole and with its origin."""
    if not isinstance(source, str | Path):
        return _in_memory(source, split, columns)
    name = str(source)
    path = absolute_path(source, "questions") if name.strip() else Path(name)
    if path.is_file():
        stem = path.name.split(".")[0]
        return ReadQuestions(_from_file(path, stem, split, columns), stem, str(path), path, split)
    if path.is_dir():
        raise QuestionsError(f"{path} is a folder: name the file within it")
    if name == "atlas":
        return ReadQuestions(_atlas(split), name, name, split=split)
    if reference := read_reference(name):
        found = fetch_questions_file(reference, split)
        folder = found.filename.split("/")[-2:-1]
        suite = folder[0] if folder and folder[0] in SUITES else reference.name.split("/")[-1]
        read = split_of(reference, split)
        questions = _from_file(found.path, suite, split if split != read else None, columns)
        return ReadQuestions(questions, suite, found.source, found.path, split or read)
    if is_data_file(path):
        raise QuestionsError(f"there is no question file {path} (looked in {path.parent})")
    raise QuestionsError(
        f"unknown questions {name!r}: give 'atlas', a file ({FORMATS}), one of {', '.join(SUITES)}, "
        "or a Hugging Face data set as 'org/name'"
    )


def _in_memory(source: object, split: str | None, columns: Columns | None) -> ReadQuestions:
    if isinstance(own := getattr(source, "questions", None), tuple):  # a suite that is ready
        source = own
    if isinstance(source, Mapping):
        source = _split_of_mapping(source, split)
        split = None
    try:
        table = MemoryRows(source)
        if isinstance(table.first(), Question):
            return ReadQuestions(_given(table, split), "questions", MEMORY, split=split)
        questions = questions_of_rows(table.rows(), table.name, TABLE, split, columns)
        return ReadQuestions(questions, TABLE, MEMORY, split=split)
    except UnreadableFileError as error:
        raise QuestionsError(str(error)) from error


def _split_of_mapping(source: Mapping[Any, Any], split: str | None) -> object:
    """One table of a ``DatasetDict``."""
    names = ", ".join(map(str, source))
    if split is None:
        raise QuestionsError(
            f"a dict of {names} is no table: give one of its values, or a list with a dict for each row"
        )
    if split not in source:
        raise QuestionsError(f"there is no split {split!r}: the splits are {names}")
    return source[split]


def _given(table: MemoryRows, split: str | None) -> tuple[Question, ...]:
    """Questions as they are."""
    found: list[Question] = []
    places: list[str] = []
    for place, (_, item) in enumerate(table, start=1):
        if not isinstance(item, Question):
            raise QuestionsError(
                f"question {place} is a {type(item).__name__}: give Question(id, question, golden_answers), or a dict for "
                "each of them"
            )
        if split is not None and item.metadata.get("split") != split:
            continue
        item.check_scorable()
        found.append(item)
        places.append(f"question {place}")
    if not found:
        raise QuestionsError(f"no question says split={split!r} in its metadata" if split else "there are no questions")
    _tell_of_unmatched("the questions", places, found)
    return tuple(found)


def questions_of_rows(
    rows: Iterable[Row], source: str | Path, suite: str, split: str | None = None, columns: Columns | None = None
) -> tuple[Question, ...]:
    """Questions of rows as :func:`load_questions` describes them.

    Args:
        source: where the rows come from, for messages.
        suite: ``data_source`` of rows that name none.
        columns: as there.

    Raises:
        QuestionsError: there are none, or one that cannot be used.
    """
    chosen = list(_of_split(source, renamed(rows, columns, QUESTION_COLUMNS, source), split))
    if not chosen:
        raise QuestionsError(f"{source} holds no questions" + (f" of split {split!r}" if split else ""))
    questions = [_question(source, place, row, suite) for place, row in chosen]
    places = [place for place, _ in chosen]
    _tell_of_unmatched(source, places, questions)
    return _with_unique_ids(source, places, questions)


def _atlas(split: str | None) -> tuple[Question, ...]:
    from searchr1_async.data.atlas import atlas_questions

    if split is not None and split not in ATLAS_SPLITS:
        raise QuestionsError(f"the atlas has no split {split!r}: take {' or '.join(map(repr, ATLAS_SPLITS))}, or None")
    try:
        questions = atlas_questions()
    except CorpusError as error:
        raise QuestionsError(str(error)) from error
    return tuple(question for question in questions if split is None or question.metadata["split"] == split)


def _from_file(path: Path, suite: str, split: str | None, columns: Columns | None) -> tuple[Question, ...]:
    try:
        return questions_of_rows(read_rows(path), path, suite, split, columns)
    except UnreadableFileError as error:
        raise QuestionsError(str(error)) from error


def _of_split(source: str | Path, rows: Iterable[Row], split: str | None) -> Iterator[Row]:
    for place, row in rows:
        if split is not None and "split" not in row:
            raise QuestionsError(
                f"{source}, {place} has no column 'split', so split={split!r} cannot be told apart: leave split out"
            )
        if split is None or row["split"] == split:
            yield place, row


def _question(source: str | Path, place: str, row: Mapping[str, Any], suite: str) -> Question:
    try:
        return question_of(row, suite)
    except LayoutError as error:
        raise QuestionsError(f"{source}, {place} {error}") from None
    except QuestionsError as error:
        raise QuestionsError(f"{source}, {place}: {error}") from None


def _tell_of_unmatched(source: str | Path, places: Sequence[str], questions: Sequence[Question]) -> None:
    """Published suites have such rows ("---" in Natural Questions), and a reward of one's own may see it otherwise."""
    found = [
        (place, question.golden_answers)
        for place, question in zip(places, questions, strict=True)
        if not any(map(_is_matched, question.golden_answers))
    ]
    if found:
        logger.warning(
            "%s: exact match is without punctuation and articles, so that no answer is ever right for %d of the questions, the "
            "first: %s, %s. Write them as words, leave the rows out, or give a reward of your own",
            source,
            len(found),
            *found[0],
        )


def _is_matched(answer: str) -> bool:
    # Most begin with a word that is no article, and normalisation takes time.
    return (len(answer) > 3 and answer[:4].isalnum()) or bool(normalize_answer(answer))


def _with_unique_ids(source: str | Path, places: Sequence[str], questions: list[Question]) -> tuple[Question, ...]:
    """Gives every question an id of its own.

    A row without one is named by its content, so that its id survives a change of order. The recipe's file numbers
    each of its sources from 0: ids that are only unique within their source get the source in front.
    """
    copies: Counter[str] = Counter()
    for index, question in enumerate(questions):
        if not question.id:
            content = "\x1f".join((question.question, *question.golden_answers))
            name = f"{question.data_source}/{hashlib.sha256(content.encode('utf-8', 'replace')).hexdigest()[:16]}"
            copies[name] += 1
            questions[index] = replace(question, id=name if copies[name] == 1 else f"{name}-{copies[name]}")
    if len({question.id for question in questions}) == len(questions):
        return tuple(questions)
    first: dict[tuple[str, str], str] = {}
    for place, question in zip(places, questions, strict=True):
        key = (question.data_source, question.id)
        if key in first:
            raise QuestionsError(
                f"{source}, {place} has the same id {question.id!r} as {first[key]}: make ids unique, "
                "or leave the column out and they are made from the content"
            )
        first[key] = place
    return tuple(replace(question, id=f"{question.data_source}/{question.id}") for question in questions)
