"""Parses rows of question files and corpora, in the layouts of published data sets. Pure.

========================  ==========================================================================================
layout                    golden answers
========================  ==========================================================================================
FlashRAG                  ``golden_answers``: a list
SQuAD                     ``answers``: ``{"text": [...], "answer_start": [...]}``
TriviaQA                  ``answer``: ``{"value": ..., "aliases": [...], ...}``; without its normalised forms
Natural Questions, others ``answer`` or ``answers``: a list or a text, also as JSON or a Python literal
MuSiQue                   ``answer`` with ``answer_aliases``
KILT                      ``output`` (named with ``columns``): a list of ``{"answer": ...}``
PopQA                     ``possible_answers``: a list as JSON
Search-R1                 ``reward_model``: ``{"ground_truth": {"target": ...}}``, also as JSON
========================  ==========================================================================================

The first of these columns with a value is used. A text that is not entirely a JSON or Python list or dict is one answer, verbatim; so
is every text within a list. Ambiguous values are rejected.
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

from searchr1_async.boundary.settings import shown, shown_with_kind
from searchr1_async.boundary.tables import did_you_mean, is_missing, name_text, number_text, plain_cell
from searchr1_async.episodes.types import Passage, Question

QUESTION_COLUMNS = ("question", "golden_answers", "id", "data_source", "split", "metadata")
PASSAGE_COLUMNS = ("text", "id", "title", "contents")

_ANSWER_COLUMNS = ("golden_answers", "answers", "answer", "possible_answers")
_REWARD_MODEL = "reward_model"
_NOT_KEPT = frozenset({"id", "question", "golden_answers", "data_source", "prompt", "reward_model", "metadata"})
_MAIN_KEYS = ("text", "value", "target", "answer", "ground_truth")
"""Keys that hold the answer in a dict; the first one present is used."""
_WRITTEN_KEYS = frozenset({"target", "ground_truth"})
"""Keys whose value may be a list written as text."""
_HIDDEN = "<unk>"
"""Placeholder for the answers in TriviaQA's test split."""
_OTHER_WORDS = {
    "question": ("query", "q", "prompt", "input", "problem"),
    "golden_answers": ("gold_answers", "ground_truth", "target", "label", "output"),
    "id": ("_id", "docid", "passage_id"),
    "text": ("passage", "content", "body", "document"),
}
_WRITTEN = re.compile(r"\s*(\[.*\]|\{.*\})\s*", re.DOTALL)
_NUMPY = re.compile(r"\barray\(\[")


class LayoutError(Exception):
    """What is wrong with a row; a predicate whose subject is the row's place."""


def question_of(row: Mapping[str, Any], suite: str) -> Question:
    """The question of a row; its id is "" if the row has none.

    Args:
        suite: default ``data_source``.

    Raises:
        LayoutError: a column is missing or ambiguous.
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
    """The passage of a row with ``id``, optional ``title`` and ``text``; or with ``id`` and ``contents``.

    Raises:
        LayoutError: a column is missing or not text.
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
        raise LayoutError("has no 'id': every passage needs a unique one")
    return Passage(own_id, title, text)


def split_contents(contents: str, *, only_quoted: bool = False) -> tuple[str, str]:
    """Splits contents into title (the first line, unquoted) and text; no title if nothing follows the first line.

    Args:
        contents: title, newline, text.
        only_quoted: accept only a quoted first line as title.
    """
    line, newline, text = contents.partition("\n")
    line = line.strip()
    is_quoted = len(line) > 2 and line[0] == line[-1] == '"'
    if not newline or not text.strip() or (only_quoted and not is_quoted):
        return "", contents
    return line.strip('"'), text


def read_texts(value: Any) -> tuple[str, ...]:
    """The texts (golden answers, searches) in a column's value, in order, without blanks and duplicates.

    Args:
        value: a text, number, list, or dict of a layout above, nested in any way.

    Raises:
        LayoutError: the value is ambiguous; the message says why.
    """
    is_plain = isinstance(value, list) and all([isinstance(each, str) for each in value])  # the common case
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
    if isinstance(found, Mapping) and isinstance(text := found.get("text"), str):  # tokenised Natural Questions
        return text
    state = "null or NaN" if is_missing(found) else shown_with_kind(found)
    raise LayoutError(f"has a 'question' that is not text but {state}: its columns are {_names(row)}")


def _golden_answers(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The column that was read, and its answers."""
    column, value = _answer_column(row)
    try:
        answers = read_texts(value)
        if column == "answer" and not is_missing(aliases := row.get("answer_aliases")):
            answers = tuple(dict.fromkeys((*answers, *read_texts(aliases))))
    except (LayoutError, RecursionError) as error:
        raise LayoutError(
            f"has golden answers that cannot be read: {column!r} is {shown(value)}, and {error or 'it is nested too deeply'}"
        ) from None
    if not answers:
        raise LayoutError(f"has no golden answer ({column!r} is {shown(value)}): add at least one, or remove the row")
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
        raise LayoutError(f"has no golden answer ({there[0]!r} is null or NaN): add at least one, or remove the row")
    raise LayoutError(
        f"has neither 'golden_answers' nor {', '.join(map(repr, _ANSWER_COLUMNS[1:]))} or 'reward_model.ground_truth': "
        f"its columns are {_names(row)}{_remedy('golden_answers', row, 'load_questions')}"
    )


def _flat(value: Any) -> Iterator[str]:
    """All answers in a parsed value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _flat(inner)
    elif isinstance(value, Mapping):
        key = next((key for key in _MAIN_KEYS if not is_missing(value.get(key))), None)
        if key is None and not any(name in value for name in (*_MAIN_KEYS, "aliases")):
            raise LayoutError(
                f"{shown(dict(value))} has none of the keys {', '.join(_MAIN_KEYS)}: write the answers as a list of texts"
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
        return f"{value} is not an answer: write the word that the model should say, such as 'yes' or 'no'"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{shown_with_kind(value)} is bytes: decode it to text"
    return f"{shown_with_kind(value)} is neither text nor a number: write the answers as a list of texts"


def _parsed(value: Any) -> Any:
    """Parses a text that is a JSON or Python list or dict; returns other values unchanged."""
    if not isinstance(value, str) or not _WRITTEN.fullmatch(value):
        return value
    text = value.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if _NUMPY.search(text):
        raise LayoutError("it is an array as printed by numpy: write the file as JSONL or Parquet, or the list as JSON")
    try:
        if _has_neighbouring_texts(text):
            # Python would concatenate them; ['Paris' 'Rome'] is how numpy prints an array of two.
            raise LayoutError("its texts have no comma between them, as numpy prints arrays: write the list as JSON")
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return value
    return found if isinstance(found, list | dict) and _is_plain(found) else value


def _has_neighbouring_texts(text: str) -> bool:
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
    return any(one == other == tokenize.STRING for one, other in pairwise(kinds))


def _is_plain(value: Any) -> bool:
    """Whether JSON could represent it; ``[...]`` is Python only, and so an answer, verbatim."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _passage_text(row: Mapping[str, Any], column: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        state = "null" if is_missing(text) else "blank" if isinstance(text, str) else f"a {type(text).__name__}"
        raise LayoutError(f"has a {column!r} that is {state}: remove the row, or give it text")
    return text


def _name(row: Mapping[str, Any], column: str) -> str:
    found = name_text(row.get(column))
    if found is None:
        raise LayoutError(f"has a {column!r} that is {shown_with_kind(row[column])}: use text or a number")
    return found


def _metadata(row: Mapping[str, Any], answer_column: str) -> dict[str, Any]:
    """The other columns, with FlashRAG's column ``metadata`` merged in."""
    inner = row.get("metadata")
    metadata = dict(inner) if isinstance(inner, Mapping) else {}
    for key, value in row.items():
        if key not in _NOT_KEPT and key != answer_column:
            metadata[key] = value
    return {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()}


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row))


def _remedy(name: str, row: Mapping[str, Any], reader: str) -> str:
    """A guess at the column's actual name, and how to pass it."""
    guess = did_you_mean(name, row, _OTHER_WORDS.get(name, ()))
    example = guess.rpartition("mean ")[2][:-2] if guess else "'…'"
    return f"{guess}; name it with {reader}(…, columns={{{name!r}: {example}}})"
