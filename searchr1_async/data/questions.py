"""Question suites: the built-in one, files, and the data sets of the field on the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from searchr1_async.data.files import Row, UnreadableFileError, is_data_file, read_rows
from searchr1_async.data.hub import SUITES, fetch_questions_file, read_reference, split_of
from searchr1_async.episodes.types import Question
from searchr1_async.errors import CorpusError, QuestionsError

Questions = str | Path | Sequence[Question]
"""A suite's name, a file, or questions; see :func:`load_questions`."""

ATLAS_SPLITS = ("train", "held_out")
_OWN_COLUMNS = frozenset({"id", "question", "golden_answers", "data_source"})
_NOT_KEPT = frozenset({*_OWN_COLUMNS, "prompt", "reward_model", "metadata"})


def load_questions(
    name_or_path: str | Path, *, split: str | None = None, limit: int | None = None, seed: int | None = None
) -> tuple[Question, ...]:
    """Reads a question suite, whole and checked, before any work starts.

    Args:
        name_or_path: ``"atlas"`` (built in); a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file; a suite of
            FlashRAG (``"nq"``, ``"triviaqa"``, ``"popqa"``, ``"hotpotqa"``, ``"2wikimultihopqa"``, ``"musique"``,
            ``"bamboogle"``) or any data set ``"org/name"`` on the Hugging Face hub, of a certain revision with
            ``"nq@<commit>"``. A file wins over a name.
            Rows hold ``question`` and ``golden_answers`` (a list or one string), and may hold ``id`` and
            ``data_source``; without ``golden_answers``, ``reward_model.ground_truth`` is read, which the recipe's
            files hold as a dict with ``target``, a list, or a string. The other columns become ``metadata``.
        split: ``"train"`` or ``"held_out"`` of the atlas; the file of that name on the hub; in a file, the rows
            whose column ``split`` says so. None takes every row (on the hub: the suite's usual split).
        limit: at most so many questions, the first ones (of the seed's order, with a seed).
        seed: orders by it, see :func:`sampled`; None keeps the suite's own order.

    Raises:
        QuestionsError: unknown name, unreadable or empty file, missing column, a question without a golden answer,
            duplicate ids, an unknown split, or a hub that does not answer: each with the place and the remedy.
    """
    check_limit(limit)
    return sampled(read_questions(name_or_path, split).questions, limit, seed)


def check_limit(limit: int | None) -> None:
    """Refuses a limit below 1 before anything is read."""
    if limit is not None and limit < 1:
        raise QuestionsError(f"limit is {limit}: give at least 1, or None for every question")


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
    """The questions, read where they are named.

    Raises:
        QuestionsError: there are none, something else is among them, one has no golden answer, or two have one id.
    """
    items = load_questions(questions) if isinstance(questions, str | Path) else tuple(questions)
    if not items:
        raise QuestionsError("there are no questions")
    seen: set[str] = set()
    for place, item in enumerate(items, start=1):
        if not isinstance(item, Question):
            raise QuestionsError(
                f"question {place} is a {type(item).__name__}: give Question(id, question, golden_answers), or a file's name"
            )
        item.check_scorable()
        if item.id in seen:
            raise QuestionsError(f"two questions have the id {item.id!r}: ids must be unique")
        seen.add(item.id)
    return items


@dataclass(frozen=True, slots=True)
class ReadQuestions:
    """Every question of a source (of its split), and where they came from."""

    questions: tuple[Question, ...]
    name: str
    """What the source is called, where its rows say nothing of it."""
    source: str
    """``"atlas"``, the file's absolute path, or the hub's ``org/name@<commit>/<file>``; :func:`read_questions` reads it again."""
    path: Path | None = None
    """The file."""
    split: str | None = None
    """The split asked for; on the hub always the one that was read."""


def read_questions(name_or_path: str | Path, split: str | None = None) -> ReadQuestions:
    """As :func:`load_questions`, whole and with its origin."""
    path = Path(name_or_path).expanduser()
    name = str(name_or_path)
    if path.is_file():
        stem = path.name.split(".")[0]
        return ReadQuestions(_from_file(path, stem, split), stem, str(path.absolute()), path, split)
    if path.is_dir():
        raise QuestionsError(f"{path} is a folder: name the file within it")
    if name == "atlas":
        return ReadQuestions(_atlas(split), name, name, split=split)
    if reference := read_reference(name):
        found = fetch_questions_file(reference, split)
        folder = found.filename.split("/")[-2:-1]
        suite = folder[0] if folder and folder[0] in SUITES else reference.name.split("/")[-1]
        read = split_of(reference, split)
        questions = _from_file(found.path, suite, split if split != read else None)
        return ReadQuestions(questions, suite, found.source, found.path, split or read)
    if is_data_file(path):
        raise QuestionsError(f"there is no question file {path} (looked in {path.absolute().parent})")
    raise QuestionsError(
        f"unknown questions {name!r}: give 'atlas', a .jsonl or .parquet file, one of {', '.join(SUITES)}, "
        "or a Hugging Face data set as 'org/name'"
    )


def questions_of_rows(
    rows: Iterable[Row], source: str | Path, suite: str, split: str | None = None
) -> tuple[Question, ...]:
    """Questions of rows as :func:`load_questions` describes them.

    Args:
        source: where the rows come from, for messages.
        suite: ``data_source`` of rows that name none.

    Raises:
        QuestionsError: there are none, or one that cannot be used.
    """
    chosen = list(_of_split(source, rows, split))
    if not chosen:
        raise QuestionsError(f"{source} holds no questions" + (f" of split {split!r}" if split else ""))
    questions = [_question(source, place, row, suite) for place, row in chosen]
    return _with_unique_ids(source, [place for place, _ in chosen], questions)


def _atlas(split: str | None) -> tuple[Question, ...]:
    from searchr1_async.data.atlas import atlas_questions

    if split is not None and split not in ATLAS_SPLITS:
        raise QuestionsError(f"the atlas has no split {split!r}: take {' or '.join(map(repr, ATLAS_SPLITS))}, or None")
    try:
        questions = atlas_questions()
    except CorpusError as error:
        raise QuestionsError(str(error)) from error
    return tuple(question for question in questions if split is None or question.metadata["split"] == split)


def _from_file(path: Path, suite: str, split: str | None) -> tuple[Question, ...]:
    try:
        return questions_of_rows(read_rows(path), path, suite, split)
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
    text = row.get("question")
    if not isinstance(text, str):
        problem = "has no column 'question'" if "question" not in row else "has a 'question' that is no text"
        raise QuestionsError(f"{source}, {place} {problem}: its columns are {', '.join(map(str, row))}")
    answers = _golden_answers(source, place, row)
    data_source = row.get("data_source")
    own_id = row.get("id")
    try:
        return Question(
            id=str(own_id) if own_id not in (None, "") else "",
            question=text.strip(),
            golden_answers=answers,
            data_source=str(data_source) if data_source else suite,
            metadata=_metadata(row),
        )
    except QuestionsError as error:
        raise QuestionsError(f"{source}, {place}: {error}") from error


def _golden_answers(source: str | Path, place: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    found = row.get("golden_answers")
    if found is None:
        reward_model = row.get("reward_model")
        found = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    if isinstance(found, Mapping):
        found = found.get("target")
    if found is None:
        raise QuestionsError(
            f"{source}, {place} has neither 'golden_answers' nor 'reward_model.ground_truth': "
            f"its columns are {', '.join(map(str, row))}"
        )
    if isinstance(found, str | int | float) or not isinstance(found, Sequence):
        found = [found]
    answers = dict.fromkeys(str(answer).strip() for answer in found if answer is not None)
    answers.pop("", None)
    if not answers:
        raise QuestionsError(f"{source}, {place} has no golden answer: give it at least one, or leave the row out")
    return tuple(answers)


def _metadata(row: Mapping[str, Any]) -> dict[str, Any]:
    """The other columns; FlashRAG's column ``metadata`` is laid open beside them."""
    inner = row.get("metadata")
    metadata = dict(inner) if isinstance(inner, Mapping) else {}
    metadata |= {key: value for key, value in row.items() if key not in _NOT_KEPT}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()}


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
