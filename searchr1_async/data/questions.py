"""Question suites: built in, from files, from public data sets on the Hugging Face hub, and from tables in memory.

Golden answers are read from the first of ``golden_answers`` (FlashRAG), ``answers`` (SQuAD), ``answer`` (TriviaQA, NQ; with
``answer_aliases`` MuSiQue), ``possible_answers`` (PopQA) and ``reward_model`` (Search-R1) with a value: a text, a list, or a dict of these
layouts, also as JSON or a Python literal. Every other text is one answer, verbatim; ambiguous values are rejected.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from searchr1_async.boundary import tables
from searchr1_async.boundary.settings import Count, check, shown, shown_with_kind
from searchr1_async.boundary.tables import ArrowTable, Columns, LayoutError, Row, is_missing
from searchr1_async.data.hub import SUITES, fetch_questions_file, read_reference, split_of
from searchr1_async.episodes.types import Question
from searchr1_async.errors import QuestionsError

Questions: TypeAlias = str | Path | Iterable[Question] | Iterable[Mapping[str, Any]] | ArrowTable
"""A suite's name, a file, questions, or an in-memory table; see :func:`load_questions`."""

MEMORY = "memory"
"""The source of questions that come from no file."""
_TABLE = "table"
"""Default name of in-memory rows. Equal for all containers: generated ids include it, so a run may be resumed with another one."""
_ATLAS_SPLITS = ("train", "held_out")
_COLUMNS = ("question", "golden_answers", "id", "data_source", "split", "metadata")
_ANSWER_COLUMNS = ("golden_answers", "answers", "answer", "possible_answers", "reward_model")
_NOT_KEPT = frozenset({"id", "question", "golden_answers", "data_source", "prompt", "reward_model", "metadata"})
_MAIN_KEYS = ("text", "value", "target", "answer", "ground_truth")  # of a dict, the first one present has the answer
_HIDDEN = "<unk>"  # the answers in TriviaQA's test split
_WRITTEN = re.compile(r"\s*(\[.*\]|\{.*\})\s*", re.DOTALL)
_NUMPY = re.compile(r"""\barray\(\[|[^\\,]['"]\s+['"]""")
"""An array as numpy prints it: Python would read ``['Paris' 'Rome']`` as one text."""


def load_questions(
    name_or_path: Questions,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    columns: Columns | None = None,
) -> tuple[Question, ...]:
    """Reads and checks a question suite.

    Args:
        name_or_path: ``"atlas"`` (built in); a JSONL, JSON, CSV, TSV (each also with ``.gz``) or Parquet file; a FlashRAG suite
            (``"nq"``, ``"triviaqa"``, ``"popqa"``, ``"hotpotqa"``, ``"2wikimultihopqa"``, ``"musique"``, ``"bamboogle"``);
            any data set ``"org/name"`` on the Hugging Face hub (pin a revision with ``"nq@<commit>"``; a file takes precedence
            over a name); a polars or pandas frame, a ``datasets.Dataset``, or a list of dicts or questions.
            Rows hold ``question`` and golden answers, in any layout of :mod:`~searchr1_async.data.questions`, and optionally
            ``id`` and ``data_source``. Other columns become ``metadata``.
        split: ``"train"`` or ``"held_out"`` of the atlas; the file of that name on the hub; rows with that value in the
            column ``split``. None takes every row (on the hub: the suite's usual split).
        limit: maximum number of questions, from the start of the (seeded) order.
        seed: seed of the order, see :func:`sampled`; None keeps the suite's order.
        columns: column names in the source: ``{"question": "q", "golden_answers": "answer"}``.

    Raises:
        QuestionsError: unknown name, unreadable or empty file, missing column, missing or ambiguous golden answers, duplicate
            ids, unknown split, or the hub does not respond. The message names the place and the remedy.
    """
    check_sampling(limit, seed)
    questions = read_questions(name_or_path, split, columns).questions
    if len(counts := Counter([question.id for question in questions])) < len(questions):
        raise QuestionsError(f"duplicate question id {counts.most_common(1)[0][0]!r}: ids must be unique")
    return sampled(questions, limit, seed)


def optional_questions(questions: Questions | None) -> tuple[Question, ...]:
    """Like :func:`load_questions`; empty for None or an empty list."""
    if questions is None or (isinstance(questions, str | Sequence) and not questions):
        return ()
    return load_questions(questions)


def check_sampling(limit: int | None, seed: int | None) -> None:
    """Raises ConfigurationError unless limit and seed are integers or None, and the limit is at least 1."""
    check("limit", limit, Count | None)
    check("seed", seed, int | None)


def sampled(questions: Sequence[Question], limit: int | None, seed: int | None) -> tuple[Question, ...]:
    """The first ``limit`` questions; with a seed, in the order of SHA-256 of ``"<seed>/<id>"``.

    A seed selects the same questions on any machine, whatever the order of the file. A larger limit extends a smaller one, and
    adding or removing a question moves no other.
    """
    if seed is not None:
        questions = sorted(
            questions, key=lambda each: hashlib.sha256(f"{seed}/{each.id}".encode("utf-8", "surrogatepass")).digest()
        )
    return tuple(questions[:limit])


@dataclass(frozen=True, slots=True)
class ReadQuestions:
    """All questions of a source (and split), with their origin."""

    questions: tuple[Question, ...]
    name: str
    """Name of the source, used where its rows name none."""
    source: str
    """``"atlas"``, a file's absolute path, the hub's ``org/name@<commit>/<file>`` (all readable again), or :data:`MEMORY`."""
    path: Path | None = None
    """The file, if any."""
    split: str | None = None
    """The requested split; on the hub, the one that was read."""


def read_questions(source: Questions, split: str | None = None, columns: Columns | None = None) -> ReadQuestions:
    """Like :func:`load_questions`, without sampling, and with the origin."""
    with tables.table_errors(QuestionsError):
        if not isinstance(source, str | Path):
            return _in_memory(source, split, columns)
        name = str(source)
        if name == "atlas" and not Path(name).is_file():
            return ReadQuestions(_atlas(split), name, name, split=split)
        if path := tables.find_file(source, "questions"):
            stem = path.name.split(".")[0]
            return ReadQuestions(
                _of_rows(tables.read_rows(path), str(path), stem, split, columns), stem, str(path), path, split
            )
        if (reference := read_reference(name)) is None:
            raise QuestionsError(
                f"unknown questions {name!r}: use 'atlas', a file ({tables.FORMATS}), one of {', '.join(SUITES)}, "
                "or a Hugging Face data set as 'org/name'"
            )
        read = split_of(reference, split)
        path, pinned = fetch_questions_file(reference, read)
        folder = path.parent.name
        suite = folder if folder in SUITES else reference.name.split("/")[-1]
        questions = _of_rows(tables.read_rows(path), str(path), suite, split if split != read else None, columns)
        return ReadQuestions(questions, suite, str(pinned), path, split or read)


def _in_memory(source: Any, split: str | None, columns: Columns | None) -> ReadQuestions:
    if isinstance(own := getattr(source, "questions", None), tuple):  # a loaded suite
        source = own
    kind, rows = tables.memory_rows(source)
    name = "questions" if isinstance(next(rows(), ("", None))[1], Question) else _TABLE
    return ReadQuestions(_of_rows(rows(), f"the {kind}", name, split, columns), name, MEMORY, split=split)


def _atlas(split: str | None) -> tuple[Question, ...]:
    from searchr1_async.data.atlas_corpus import atlas_questions

    if split is not None and split not in _ATLAS_SPLITS:
        raise QuestionsError(f"the atlas has no split {split!r}: use {' or '.join(map(repr, _ATLAS_SPLITS))}, or None")
    return tuple(each for each in atlas_questions() if split is None or each.metadata["split"] == split)


def _of_rows(
    rows: Iterable[Row], source: str, suite: str, split: str | None, columns: Columns | None
) -> tuple[Question, ...]:
    """The questions of rows in the layouts above; ``source`` is for messages, ``suite`` the default ``data_source``."""
    is_given = False

    def read(row: Any) -> Question | None:
        nonlocal is_given
        is_given = isinstance(row, Question)
        if split is not None and _split_of(row) != split:
            return None
        question = row if isinstance(row, Question) else _question_of(row, suite)
        question.check_scorable()
        return question

    questions = {
        place: question for place, question in tables.read_values(source, rows, columns, _COLUMNS, read) if question
    }
    if not questions:
        raise QuestionsError(f"{source} holds no questions" + (f" of split {split!r}" if split else ""))
    return _with_unique_ids(source, questions, is_given=is_given)


def _split_of(row: Any) -> Any:
    row = row.metadata if isinstance(row, Question) else row
    tables.check_is_row(row, "Question")
    if "split" not in row:
        raise LayoutError("has no column 'split' to select by: omit split")
    return row["split"]


def _with_unique_ids(source: str, questions: dict[str, Question], *, is_given: bool) -> tuple[Question, ...]:
    """Makes ids unique, except of questions that were given as such.

    A row without an id gets one from its content, so it survives reordering. The recipe's file numbers each of its sources from 0:
    ids that are unique only within their source are prefixed with it.
    """
    copies: Counter[str] = Counter()
    for place, question in questions.items():
        if not question.id:
            content = "\x1f".join((question.question, *question.golden_answers))
            name = f"{question.data_source}/{hashlib.sha256(content.encode('utf-8', 'replace')).hexdigest()[:16]}"
            copies[name] += 1
            questions[place] = replace(question, id=name if copies[name] == 1 else f"{name}-{copies[name]}")
    if is_given or len({question.id for question in questions.values()}) == len(questions):
        return tuple(questions.values())
    first: dict[tuple[str, str], str] = {}
    for place, question in questions.items():
        if (other := first.setdefault((question.data_source, question.id), place)) != place:
            raise QuestionsError(
                f"{source}, {place} has the same id {question.id!r} as {other}: make ids unique, "
                "or drop the column to have ids generated"
            )
    return tuple(replace(question, id=f"{question.data_source}/{question.id}") for question in questions.values())


def _question_of(row: Any, suite: str) -> Question:
    """The question of a row; its id is "" if the row has none. Raises LayoutError or QuestionsError."""
    tables.check_is_row(row, "Question")
    if "question" not in row:
        raise LayoutError(f"has no column {tables.missing_column('question', row)}")
    text = row["question"]
    if isinstance(text, Mapping):  # tokenised Natural Questions
        text = text.get("text")
    if not isinstance(text, str):
        raise LayoutError(f"has a 'question' that is not text but {shown_with_kind(row['question'])}")
    there = [name for name in _ANSWER_COLUMNS if name in row]
    column = next((name for name in there if not is_missing(row[name])), there[0] if there else None)
    if column is None:
        raise LayoutError(
            f"has no golden answer in {', '.join(_ANSWER_COLUMNS[1:])} or {tables.missing_column('golden_answers', row)}"
        )
    inner = row.get("metadata")  # FlashRAG's
    others = {key: value for key, value in row.items() if key not in _NOT_KEPT and key != column}
    metadata = {**(inner if isinstance(inner, Mapping) else {}), **others}
    return Question(
        id=tables.name_in(row, "id"),
        question=text.strip(),
        golden_answers=_golden_answers(row, column),
        data_source=tables.name_in(row, "data_source") or suite,
        metadata={key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()},
    )


def _golden_answers(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    try:
        answers = read_texts(row[column])
        if column == "answer" and not is_missing(aliases := row.get("answer_aliases")):
            answers = tuple(dict.fromkeys((*answers, *read_texts(aliases))))
    except (LayoutError, RecursionError) as error:
        raise LayoutError(
            f"has golden answers that cannot be read: {column!r} is {shown(row[column])}, and {error}"
        ) from None
    if not answers:
        raise LayoutError(
            f"has no golden answer ({column!r} is {shown(row[column])}): add at least one, or remove the row"
        )
    return answers


def read_texts(value: Any) -> tuple[str, ...]:
    """The texts (golden answers, searches) of a value in any layout above, without blanks and duplicates. Raises LayoutError."""
    is_plain = isinstance(value, list) and all([isinstance(each, str) for each in value])  # the common case
    texts = value if is_plain else _flat(_parsed(tables.plain_cell(value)))
    answers = dict.fromkeys([text.strip() for text in texts if text != _HIDDEN])
    answers.pop("", None)
    return tuple(answers)


def _flat(value: Any) -> Iterator[str]:
    """All answers in a parsed value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _flat(inner)
    elif isinstance(value, Mapping):
        if not any(name in value for name in (*_MAIN_KEYS, "aliases")):
            raise LayoutError(
                f"{shown(dict(value))} has none of the keys {', '.join(_MAIN_KEYS)}: write a list of texts"
            )
        yield from _flat(_parsed(next((value[key] for key in _MAIN_KEYS if not is_missing(value.get(key))), None)))
        yield from _flat(value.get("aliases"))
    elif isinstance(value, bool):
        raise LayoutError(f"{value} is not an answer: write the word that the model should say, such as 'yes' or 'no'")
    elif not is_missing(value):
        if (text := tables.number_text(value)) is None:
            raise LayoutError(f"{shown_with_kind(value)} is neither text nor a number: write a list of texts")
        yield text


def _parsed(value: Any) -> Any:
    """Parses a text that is a JSON or Python list or dict; returns other values unchanged."""
    if not isinstance(value, str) or not _WRITTEN.fullmatch(value):
        return value
    with suppress(ValueError, RecursionError):
        return json.loads(value)
    found = None
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = ast.literal_eval(value.strip())
    is_read = isinstance(found, list | dict)  # a set is one answer, verbatim
    if _NUMPY.search(value) and (is_read or "array([" in value):
        raise LayoutError("it is an array as printed by numpy: write the file as JSONL or Parquet, or the list as JSON")
    return found if is_read else value
