"""Question suites: built in, from files, and from public data sets on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.settings import as_integer
from searchr1_async.boundary.tables import (
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
from searchr1_async.data.layouts import QUESTION_COLUMNS, LayoutError, question_of
from searchr1_async.episodes.reward import normalize_answer
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, CorpusError, QuestionsError

logger = logging.getLogger(__name__)

Questions: TypeAlias = str | Path | Iterable[Question] | Iterable[Mapping[str, Any]] | ArrowTable
"""A suite's name, a file, questions, or an in-memory table; see :func:`load_questions`."""

MEMORY = "memory"
"""The source of questions that come from no file."""
TABLE = "table"
"""Default name of in-memory rows. Equal for all containers: generated ids include it, so a run may be resumed with another one."""
ATLAS_SPLITS = ("train", "held_out")
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
SUITES = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
"""FlashRAG's standard suites, each with the split that is usually reported."""

HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(rf"(?P<name>{HUB_NAME}|{'|'.join(SUITES)})(?:@(?P<revision>[\w.-]+)(?:/(?P<filename>[^#]+))?)?")


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
            Rows hold ``question`` and golden answers, in ``golden_answers``, ``answers``, ``answer``, ``possible_answers`` or
            ``reward_model.ground_truth`` in any layout of :mod:`~searchr1_async.data.layouts`, and optionally ``id`` and
            ``data_source``. Other columns become ``metadata``.
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
    counts = Counter([question.id for question in questions])
    if len(counts) < len(questions):
        raise QuestionsError(f"duplicate question id {counts.most_common(1)[0][0]!r}: ids must be unique")
    return sampled(questions, limit, seed)


def check_sampling(limit: int | None, seed: int | None) -> None:
    """Checks that limit and seed are integers, and the limit at least 1.

    Raises:
        QuestionsError: they are not.
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

    A seed selects the same questions on any machine, whatever the order of the file. A larger limit extends a smaller one, and
    adding or removing a question moves no other.
    """
    if seed is not None:
        questions = sorted(questions, key=lambda question: _place(seed, question.id))
    return tuple(questions[:limit])


def _place(seed: int, question_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{question_id}".encode("utf-8", "surrogatepass")).digest()


def checked_questions(questions: Questions) -> tuple[Question, ...]:
    """Loads questions if given by name, file or table.

    Raises:
        QuestionsError: see :func:`load_questions`.
    """
    return load_questions(questions)


def optional_questions(questions: Questions | None) -> tuple[Question, ...]:
    """Like :func:`checked_questions`; empty for None or an empty list.

    Raises:
        QuestionsError: see :func:`load_questions`.
    """
    if questions is None or (isinstance(questions, str | Sequence) and not questions):
        return ()
    return checked_questions(questions)


@dataclass(frozen=True, slots=True)
class ReadQuestions:
    """All questions of a source (and split), with their origin."""

    questions: tuple[Question, ...]
    name: str
    """Name of the source, used where its rows name none."""
    source: str
    """``"atlas"``, the absolute path of a file, the hub's ``org/name@<commit>/<file>`` (all readable by :func:`read_questions`), or
    :data:`MEMORY`."""
    path: Path | None = None
    """The file, if any."""
    split: str | None = None
    """The requested split; on the hub, the one that was read."""


def read_questions(source: Questions, split: str | None = None, columns: Columns | None = None) -> ReadQuestions:
    """Like :func:`load_questions`, without sampling, and with the origin."""
    if not isinstance(source, str | Path):
        return _in_memory(source, split, columns)
    name = str(source)
    path = absolute_path(source, "questions") if name.strip() else Path(name)
    if path.is_file():
        stem = path.name.split(".")[0]
        return ReadQuestions(_from_file(path, stem, split, columns), stem, str(path), path, split)
    if path.is_dir():
        raise QuestionsError(f"{path} is a folder: name a file in it")
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
        raise QuestionsError(f"the question file {path} does not exist (looked in {path.parent})")
    raise QuestionsError(
        f"unknown questions {name!r}: use 'atlas', a file ({FORMATS}), one of {', '.join(SUITES)}, "
        "or a Hugging Face data set as 'org/name'"
    )


def _in_memory(source: object, split: str | None, columns: Columns | None) -> ReadQuestions:
    if isinstance(own := getattr(source, "questions", None), tuple):  # a loaded suite
        source = own
    chosen = split
    if isinstance(source, Mapping):
        source, split = _split_of_mapping(source, split), None
    try:
        table = MemoryRows(source)
        if isinstance(table.first(), Question):
            return ReadQuestions(_given(table, split), "questions", MEMORY, split=chosen)
        questions = questions_of_rows(table.rows(), table.name, TABLE, split, columns)
        return ReadQuestions(questions, TABLE, MEMORY, split=chosen)
    except UnreadableFileError as error:
        raise QuestionsError(str(error)) from error


def _split_of_mapping(source: Mapping[Any, Any], split: str | None) -> object:
    """One table of a ``DatasetDict``."""
    names = ", ".join(map(str, source))
    if split is None:
        raise QuestionsError(f"a dict of {names} is not a table: pass one of its values, or a list with a dict per row")
    if split not in source:
        raise QuestionsError(f"there is no split {split!r}: available splits are {names}")
    return source[split]


def _given(table: MemoryRows, split: str | None) -> tuple[Question, ...]:
    found: list[Question] = []
    places: list[str] = []
    for place, (_, item) in enumerate(table, start=1):
        if not isinstance(item, Question):
            raise QuestionsError(
                f"question {place} is a {type(item).__name__}: pass Question(id, question, golden_answers) or a dict for "
                "each"
            )
        if split is not None and item.metadata.get("split") != split:
            continue
        item.check_scorable()
        found.append(item)
        places.append(f"question {place}")
    if not found:
        raise QuestionsError(f"no question has split={split!r} in its metadata" if split else "there are no questions")
    _warn_of_unmatched("the questions", places, found)
    return tuple(found)


def questions_of_rows(
    rows: Iterable[Row], source: str | Path, suite: str, split: str | None = None, columns: Columns | None = None
) -> tuple[Question, ...]:
    """Converts rows in the layouts of :func:`load_questions`.

    Args:
        source: origin of the rows, for messages.
        suite: default ``data_source``.
        columns: see :func:`load_questions`.

    Raises:
        QuestionsError: there are no rows, or one cannot be used.
    """
    chosen = list(_of_split(source, renamed(rows, columns, QUESTION_COLUMNS, source), split))
    if not chosen:
        raise QuestionsError(f"{source} holds no questions" + (f" of split {split!r}" if split else ""))
    questions = [_question(source, place, row, suite) for place, row in chosen]
    places = [place for place, _ in chosen]
    _warn_of_unmatched(source, places, questions)
    return _with_unique_ids(source, places, questions)


def _atlas(split: str | None) -> tuple[Question, ...]:
    from searchr1_async.data.atlas_corpus import atlas_questions

    if split is not None and split not in ATLAS_SPLITS:
        raise QuestionsError(f"the atlas has no split {split!r}: use {' or '.join(map(repr, ATLAS_SPLITS))}, or None")
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
                f"{source}, {place} has no column 'split', so split={split!r} cannot be selected: omit split"
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


def _warn_of_unmatched(source: str | Path, places: Sequence[str], questions: Sequence[Question]) -> None:
    """Warns only: published suites have such rows ("---" in Natural Questions), and a custom reward may accept them."""
    found = [
        (place, question.golden_answers)
        for place, question in zip(places, questions, strict=True)
        if not any(map(_is_matched, question.golden_answers))
    ]
    if found:
        logger.warning(
            "%s: exact match ignores punctuation and articles, so no answer can match for %d of the questions, the first: "
            "%s, %s. Write the answers as words, remove the rows, or use a custom reward",
            source,
            len(found),
            *found[0],
        )


def _is_matched(answer: str) -> bool:
    # A fast path, since normalisation is slow: most answers do not start with an article.
    return (len(answer) > 3 and answer[:4].isalnum()) or bool(normalize_answer(answer))


def _with_unique_ids(source: str | Path, places: Sequence[str], questions: list[Question]) -> tuple[Question, ...]:
    """Makes ids unique.

    A row without an id gets one from its content, so it survives reordering. The recipe's file numbers each of its sources from 0:
    ids that are unique only within their source are prefixed with it.
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
                "or drop the column to have ids generated"
            )
        first[key] = place
    return tuple(replace(question, id=f"{question.data_source}/{question.id}") for question in questions)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A reference to a data set on the hub."""

    name: str
    """A key of :data:`SUITES`, or ``"org/name"``."""
    revision: str | None = None
    """A commit, branch or tag; None is the latest."""
    filename: str | None = None
    """A file; None is the split's file."""


@dataclass(frozen=True, slots=True)
class HubQuestions:
    """A downloaded question file."""

    path: Path
    repository: str
    commit: str
    """The commit of the requested revision."""
    filename: str

    @property
    def source(self) -> str:
        """A reference for :func:`read_reference` that is pinned to this commit."""
        return f"{self.repository}@{self.commit}/{self.filename}"


def read_reference(text: str) -> HubReference | None:
    """``"nq"`` or ``"org/name"``, optionally with ``@revision`` and then ``/file``; None for any other text."""
    found = _REFERENCE.fullmatch(text)
    if not found or ".." in (found["filename"] or "").split("/"):  # a manifest may be untrusted
        return None
    return HubReference(found["name"], found["revision"], found["filename"])


def split_of(reference: HubReference, split: str | None) -> str:
    """The split to read: the file's own, the requested one, the suite's usual one, or ``"train"``."""
    if reference.filename:
        return reference.filename.rsplit("/", 1)[-1].split(".")[0]
    return split or SUITES.get(reference.name, "train")


def fetch_questions_file(reference: HubReference, split: str | None) -> HubQuestions:
    """Downloads the file of one split, or finds it in the hub's cache.

    Args:
        reference: one of :data:`SUITES`, or any data set with ``<split>.parquet`` or ``<split>.jsonl``.
        split: None means the suite's usual split, or ``"train"`` for other data sets.

    Raises:
        QuestionsError: the data set, revision or split does not exist, or the hub cannot be reached.
    """
    repository = FLASHRAG if reference.name in SUITES else reference.name
    split = split_of(reference, split)
    stem = f"{reference.name}/{split}" if reference.name in SUITES else split
    suffixes = ("jsonl",) if reference.name in SUITES else ("parquet", "jsonl")
    tried = tuple(f"{folder}{stem}.{suffix}" for folder in ("", "data/") for suffix in suffixes)
    for filename in (reference.filename,) if reference.filename else tried:
        if path := _fetch(repository, filename, reference.revision):
            # …/snapshots/<commit>/<filename>
            return HubQuestions(path, repository, path.parents[filename.count("/")].name, filename)
    raise QuestionsError(
        f"the Hugging Face data set {repository} has no file {reference.filename or ' or '.join(tried)}: "
        "name another split, or download the file you mean and give its path"
    )


def _fetch(repository: str, filename: str, revision: str | None) -> Path | None:
    """The file in the hub's cache; None if the data set has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        return Path(
            hf_hub_download(repository, filename, repo_type="dataset", revision=revision, endpoint=endpoint),
        )
    except LocalEntryNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face hub cannot be reached for {repository} ({filename}), and the file is not in the hub's "
            "cache: go online, pass the path of a file you downloaded, or use the built-in 'atlas'"
        ) from error
    except EntryNotFoundError:
        return None
    except RevisionNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face data set {repository} has no revision {revision!r}: use an existing commit, branch or tag"
        ) from error
    except RepositoryNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face data set {repository!r} does not exist or is not accessible: check its name, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub's client lets errors of its transport through
        raise QuestionsError(
            f"{filename} of the Hugging Face data set {repository} cannot be downloaded "
            f"({type(error).__name__}): download it yourself and pass its path, or use the built-in 'atlas'"
        ) from error
