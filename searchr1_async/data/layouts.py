"""What a row of a question file or a corpus means: the one owner of the layouts that published files have. Pure.

========================  ==========================================================================================
layout                    golden answers
========================  ==========================================================================================
FlashRAG                  ``golden_answers``: a list
SQuAD                     ``answers``: ``{"text": [...], "answer_start": [...]}``
TriviaQA                  ``answer``: ``{"value": ..., "aliases": [...], ...}``; its normalised forms are not taken
Natural Questions, others ``answer`` or ``answers``: a list or a text, also as JSON or as Python writes a list
MuSiQue                   ``answer`` with ``answer_aliases``
KILT                      ``output``, if named: a list of ``{"answer": ...}``
PopQA                     ``possible_answers``: a list as JSON
Search-R1                 ``reward_model``: ``{"ground_truth": {"target": ...}}``, also as JSON
========================  ==========================================================================================

The first of these columns that holds anything counts. A text that is no whole JSON or Python list or dict is one answer as it
stands; within a list every text is. Everything that has no one meaning is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from searchr1_async.boundary.cells import is_missing, name_text, number_text, plain_cell
from searchr1_async.boundary.rows import did_you_mean
from searchr1_async.boundary.values import shown, shown_with_kind
from searchr1_async.episodes.types import Passage, Question

QUESTION_COLUMNS = ("question", "golden_answers", "id", "data_source", "split", "metadata")
PASSAGE_COLUMNS = ("text", "id", "title", "contents")

_ANSWER_COLUMNS = ("golden_answers", "answers", "answer", "possible_answers")
_REWARD_MODEL = "reward_model"
_NOT_KEPT = frozenset({"id", "question", "golden_answers", "data_source", "prompt", "reward_model", "metadata"})
_MAIN_KEYS = ("text", "value", "target", "answer", "ground_truth")
"""In a dict that is an answer: the first of them that it has."""
_WRITTEN_KEYS = frozenset({"target", "ground_truth"})
"""What may hold a list that was written as text."""
_HIDDEN = "<unk>"
"""In place of the answers in TriviaQA's test split."""
_OTHER_WORDS = {
    "question": ("query", "q", "prompt", "input", "problem"),
    "golden_answers": ("gold_answers", "ground_truth", "target", "label", "output"),
    "id": ("_id", "docid", "passage_id"),
    "text": ("passage", "content", "body", "document"),
}
_WRITTEN = re.compile(r"\s*(\[.*\]|\{.*\})\s*", re.DOTALL)
_NUMPY = re.compile(r"\barray\(\[")


class LayoutError(Exception):
    """What is wrong with a row: the predicate of a sentence whose subject is the row's place."""


def question_of(row: Mapping[str, Any], suite: str) -> Question:
    """The question of a row; without an id of its own, its id is "".

    Args:
        suite: ``data_source`` of a row that names none.

    Raises:
        LayoutError: a column is missing, or holds what has no one meaning.
        QuestionsError: no reward can be computed for it.
    """
    text = _question_text(row)
    column, answers = _golden_answers(row)
    question = Question(
        id=_name(row, "id"),
        question=text.strip(),
        golden_answers=answers,
        data_source=_name(row, "data_source") or suite,
        metadata=_metadata(row, column),
    )
    question.check_scorable()
    return question


def passage_of(row: Mapping[str, Any]) -> Passage:
    """The passage of a row with ``id``, ``title`` (which may be missing) and ``text``; or with ``id`` and ``contents``.

    Raises:
        LayoutError: a column is missing, or holds something else than text.
    """
    missing = [name for name in ("id", "text") if name not in row]
    if missing == ["text"] and "contents" in row:
        title, text = split_contents(_passage_text(row, "contents"))
    elif missing:
        raise LayoutError(
            f"has no column {' and no column '.join(map(repr, missing))}: a corpus has 'id', 'title' and 'text' "
            f"(this one: {_names(row)}){''.join(_remedy(name, row, 'load_corpus') for name in missing)}"
        )
    else:
        title, text = row.get("title"), _passage_text(row, "text")
        if not isinstance(title, str):
            title = _name(row, "title")
    own_id = row["id"]
    if not isinstance(own_id, str):
        own_id = _name(row, "id")
    if not own_id:
        raise LayoutError("has no 'id': give every passage one of its own")
    return Passage(own_id, title, text)


def split_contents(contents: str, *, only_quoted: bool = False) -> tuple[str, str]:
    """The first line without its quotes as the title, and the text below it; no title where nothing stands below.

    Args:
        contents: title, newline, text.
        only_quoted: a first line that is not in quotes is no title.
    """
    line, newline, text = contents.partition("\n")
    line = line.strip()
    is_quoted = len(line) > 2 and line[0] == line[-1] == '"'
    if not newline or not text.strip() or (only_quoted and not is_quoted):
        return "", contents
    return line.strip('"'), text


def read_texts(value: Any) -> tuple[str, ...]:
    """The texts (golden answers, searches) that a column's value means, in their order; none where it is empty.

    Blanks and repetitions are left out.

    Args:
        value: a text, a number, a list, or a dict of one of the layouts above, in any nesting.

    Raises:
        LayoutError: it has no one meaning; the message says what is wrong with it.
    """
    is_plain = isinstance(value, list) and all([isinstance(each, str) for each in value])  # nearly always
    texts = value if is_plain else _flat(_parsed(plain_cell(value)))
    answers = dict.fromkeys([text.strip() for text in texts if text != _HIDDEN])
    answers.pop("", None)
    return tuple(answers)


def _question_text(row: Mapping[str, Any]) -> str:
    if "question" not in row:
        raise LayoutError(
            f"has no column 'question': its columns are {_names(row)}{_remedy('question', row, 'load_questions')}"
        )
    found = row["question"]
    if isinstance(found, str):
        return found
    if isinstance(found, Mapping) and isinstance(text := found.get("text"), str):  # Natural Questions with its tokens
        return text
    state = "null or NaN" if is_missing(found) else shown_with_kind(found)
    raise LayoutError(f"has a 'question' that is no text but {state}: its columns are {_names(row)}")


def _golden_answers(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The column that was read, and what it means."""
    column, value = _answer_column(row)
    try:
        answers = read_texts(value)
        if column == "answer" and not is_missing(aliases := row.get("answer_aliases")):
            answers = tuple(dict.fromkeys((*answers, *read_texts(aliases))))
    except (LayoutError, RecursionError) as error:
        raise LayoutError(
            f"has golden answers that cannot be read: {column!r} is {shown(value)}, and {error or 'it is nested too deep'}"
        ) from None
    if not answers:
        raise LayoutError(
            f"has no golden answer ({column!r} is {shown(value)}): give it at least one, or leave the row out"
        )
    return column, answers


def _answer_column(row: Mapping[str, Any]) -> tuple[str, Any]:
    for name in _ANSWER_COLUMNS:
        value = row.get(name)
        if isinstance(value, list | str) or not is_missing(value):
            return name, value
    reward_model = _parsed(row.get(_REWARD_MODEL))
    if isinstance(reward_model, Mapping) and not is_missing(found := reward_model.get("ground_truth")):
        return f"{_REWARD_MODEL}.ground_truth", found
    if there := [name for name in _ANSWER_COLUMNS if name in row]:
        raise LayoutError(
            f"has no golden answer ({there[0]!r} is null or NaN): give it at least one, or leave the row out"
        )
    raise LayoutError(
        f"has neither 'golden_answers' nor {', '.join(map(repr, _ANSWER_COLUMNS[1:]))} or 'reward_model.ground_truth': "
        f"its columns are {_names(row)}{_remedy('golden_answers', row, 'load_questions')}"
    )


def _flat(value: Any) -> Iterator[str]:
    """Every answer in a value that was read."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _flat(inner)
    elif isinstance(value, Mapping):
        key = next((key for key in _MAIN_KEYS if not is_missing(value.get(key))), None)
        if key is None and not any(name in value for name in (*_MAIN_KEYS, "aliases")):
            raise LayoutError(
                f"{shown(dict(value))} has none of the keys {', '.join(_MAIN_KEYS)}: give the answers as a list of texts"
            )
        if key is not None:
            yield from _flat(_parsed(value[key]) if key in _WRITTEN_KEYS else value[key])
        yield from _flat(value.get("aliases"))
    elif not is_missing(value):
        text = number_text(value)
        if text is None:
            raise LayoutError(_refusal(value))
        yield text


def _refusal(value: Any) -> str:
    if isinstance(value, bool):
        return f"{value} is no answer: write the word that the model is to say, such as 'yes' or 'no'"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{shown_with_kind(value)} is bytes: decode it to text"
    return f"{shown_with_kind(value)} is neither text nor a number: give the answers as a list of texts"


def _parsed(value: Any) -> Any:
    """The list or dict that a text writes out, as JSON or as Python does; every other value as it is."""
    if not isinstance(value, str) or not _WRITTEN.fullmatch(value):
        return value
    text = value.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if _NUMPY.search(text):
        raise LayoutError("it is an array as numpy prints it: write the file as JSONL or Parquet, or the list as JSON")
    try:
        if _has_neighbouring_texts(text):
            # Python would join them: ['Paris' 'Rome'] is how numpy prints an array of two.
            raise LayoutError("its texts have no comma between them, as numpy prints an array: write the list as JSON")
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return value
    return found if isinstance(found, list | dict) and _is_plain(found) else value


def _has_neighbouring_texts(text: str) -> bool:
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
    return any(one == other == tokenize.STRING for one, other in pairwise(kinds))


def _is_plain(value: Any) -> bool:
    """Made of what a file of JSON could hold too; ``[...]`` is Python's, and an answer as it stands."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _passage_text(row: Mapping[str, Any], column: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        state = "null" if is_missing(text) else "blank" if isinstance(text, str) else f"a {type(text).__name__}"
        raise LayoutError(f"has a {column!r} that is {state}: leave the row out, or give it text")
    return text


def _name(row: Mapping[str, Any], column: str) -> str:
    found = name_text(row.get(column))
    if found is None:
        raise LayoutError(f"has a {column!r} that is {shown_with_kind(row[column])}: give text or a number")
    return found


def _metadata(row: Mapping[str, Any], answer_column: str) -> dict[str, Any]:
    """The other columns; FlashRAG's column ``metadata`` is laid open beside them."""
    inner = row.get("metadata")
    metadata = dict(inner) if isinstance(inner, Mapping) else {}
    for key, value in row.items():
        if key not in _NOT_KEPT and key != answer_column:
            metadata[key] = value
    return {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()}


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row))


def _remedy(name: str, row: Mapping[str, Any], reader: str) -> str:
    """What the column may be called instead, and how to say so."""
    guess = did_you_mean(name, row, _OTHER_WORDS.get(name, ()))
    example = guess.rpartition("mean ")[2][:-2] if guess else "'…'"
    return f"{guess}; name it with {reader}(…, columns={{{name!r}: {example}}})"
