"""Rows from every kind of file and of table in memory, with columns by any name; single cells; and Parquet paths.

A path names one file: no character in it is a wildcard, and a folder is no table.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import searchr1_async as sr
from searchr1_async.boundary.tables import (
    TableError,
    did_you_mean,
    is_missing,
    name_text,
    number_text,
    plain_cell,
    read_parquet,
    read_rows,
    scan_parquet,
    scan_rows,
)
from searchr1_async.data.questions import optional_questions
from searchr1_async.data.suites import load_suite, load_suites
from searchr1_async.errors import CorpusError, QuestionsError


@pytest.mark.parametrize(("name", "other"), [("nq[1]", "nq1"), ("nq?", "nqx"), ("nq*", "nq-all"), ("nq[!a]", "nqb")])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_path_is_never_expanded(tmp_path: Path, name: str, other: str, is_folder: bool) -> None:
    def path(of: str) -> Path:
        return tmp_path / of / "rows.parquet" if is_folder else tmp_path / f"{of}.parquet"

    for number, each in enumerate((path(name), path(other))):
        each.parent.mkdir(exist_ok=True)
        pl.DataFrame({"x": [number], "y": [0]}).write_parquet(each)
    assert read_parquet(path(name), columns=["x"]).rows() == [(0,)]
    assert scan_parquet(path(name)).collect().rows() == [(0, 0)]
    rows = scan_rows([path(name), path(other)], pl.Schema({"x": pl.Int64, "y": pl.Int64, "z": pl.String}))
    assert rows.collect().rows() == [(0, 0, None), (1, 0, None)]


def test_a_missing_file_is_not_searched_for_elsewhere(tmp_path: Path) -> None:
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "nq1.parquet")
    with pytest.raises(FileNotFoundError):
        read_parquet(tmp_path / "nq[1].parquet")
    with pytest.raises(FileNotFoundError):
        scan_parquet(tmp_path / "nq[1].parquet").collect()


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "nq1.parquet")
    for read in (read_parquet, scan_parquet):
        with pytest.raises(IsADirectoryError, match="is a folder"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["~", "file:", "lr=3", "a%20b", "a#b"])
def test_a_relative_folder_is_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """polars takes the first for the user's home, the second for a URL, and may make a column of the third."""
    monkeypatch.chdir(tmp_path)
    path = Path(name) / "rows.parquet"
    (tmp_path / name).mkdir()
    content = pl.DataFrame({"x": [1]})
    with (tmp_path / path).open("wb") as file:
        content.write_parquet(file)
    assert read_parquet(path).equals(content)
    assert scan_parquet(path).collect().equals(content)
    assert scan_rows([path], content.schema).collect().equals(content)


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [
    {"id": "1", "question": "Which?", "golden_answers": ["Paris", "Lutetia"], "data_source": "nq"},
    {"id": "2", "question": "Who, then?", "golden_answers": ["Ann"], "data_source": "nq"},
]
PASSAGES = [{"id": 1, "title": "Rome", "text": "Rome is old."}, {"id": 2, "title": None, "text": "So is\nParis."}]


class Dataset:
    """What a ``datasets.Dataset`` can do."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.column_names, self.features = list(rows[0]), {}
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


class Pandas:
    """What a ``pandas.DataFrame`` can do: its lists are arrays, it has no truth value, and it iterates over its columns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.columns = list(rows[0])
        self._rows = rows

    @property
    def iloc(self) -> Any:
        frame = self

        class Located:
            def __getitem__(self, rows: slice) -> Pandas:
                return Pandas(frame._rows[rows])

        return Located()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a DataFrame is ambiguous")

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"

        def cell(value: Any) -> Any:
            return (
                np.array(value, dtype=object) if isinstance(value, list) else float("nan") if value is None else value
            )

        return [{name: cell(value) for name, value in row.items()} for row in self._rows]


class Arrow:
    """What a ``pyarrow.Table`` can do."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._frame = pl.DataFrame(rows)

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._frame.__arrow_c_stream__(requested_schema)


def _pandas(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pandas").DataFrame(rows)


def _dataset(rows: list[dict[str, Any]]) -> Any:
    names = list(dict.fromkeys(name for row in rows for name in row))  # the library takes only those of the first row
    filled = [{name: row.get(name) for name in names} for row in rows]
    return pytest.importorskip("datasets").Dataset.from_list(filled)


TABLES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "polars": pl.DataFrame,
    "polars, lazy": pl.LazyFrame,
    "like pandas": Pandas,
    "like a data set": Dataset,
    "like Arrow": Arrow,
    "pandas": _pandas,
    "datasets": _dataset,
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_table_is_the_same_questions(kind: str) -> None:
    right = sr.load_questions(
        [sr.Question("1", "Which?", ("Paris", "Lutetia"), "nq"), sr.Question("2", "Who, then?", ("Ann",), "nq")]
    )
    make = TABLES[kind]
    assert sr.load_questions(make(ROWS)) == right
    assert optional_questions(make(ROWS)) == right
    assert load_suite(make(ROWS)).questions == right
    assert [suite.name for suite in load_suites(make(ROWS))] == ["nq"]
    other = [
        {"q": row["question"], "answer": row["golden_answers"], "id": row["id"], "data_source": "nq"} for row in ROWS
    ]
    assert sr.load_questions(make(other), columns={"question": "q", "golden_answers": "answer"}) == right


@pytest.mark.parametrize("kind", TABLES)
def test_every_table_is_the_same_corpus(kind: str) -> None:
    right = [sr.Passage("1", "Rome", "Rome is old."), sr.Passage("2", "", "So is\nParis.")]
    corpus = sr.load_corpus(TABLES[kind](PASSAGES))
    assert list(corpus.passages()) == list(corpus.passages()) == right
    assert (len(corpus), corpus.fingerprint) == (2, sr.load_corpus(right).fingerprint)
    other = [{"_id": row["id"], "title": row["title"], "body": row["text"]} for row in PASSAGES]
    named = sr.load_corpus(TABLES[kind](other), columns={"id": "_id", "text": "body"})
    assert named.fingerprint == corpus.fingerprint


FILES: dict[str, str] = {
    "q.jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
    "q.json": json.dumps(ROWS, indent=2),
    "q.csv": 'id,question,golden_answers,data_source\n1,Which?,"[""Paris"", ""Lutetia""]",nq\r\n2,"Who, then?",Ann,nq\n',
    "q.tsv": "id\tquestion\tgolden_answers\tdata_source\n1\tWhich?\t['Paris', 'Lutetia']\tnq\n2\tWho, then?\tAnn\tnq\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_every_file_is_the_same_questions(tmp_path: Path, name: str, is_packed: bool) -> None:
    content = FILES[name].encode()
    path = tmp_path / (f"{name}.gz" if is_packed else name)
    path.write_bytes(gzip.compress(content) if is_packed else content)
    assert sr.load_questions(path) == sr.load_questions(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "q.csv",
            "question,answer\nWhich?,Paris\nWho, then?,Ann",
            "line 3 has not as many cells as the first line has columns",
        ),
        ("q.csv", 'question,answer\n"a\nb",c\n"Who?,Ann\n', "line 4 cannot be read: unexpected end of data"),
        ("q.tsv", 'question\tanswer\n"Who" is it?\tAnn\n', "line 2 cannot be read"),
        ("q.csv", "question,question\na,b", "a column twice in its first line"),
        ("q.csv", "question;answer\na;b", "no column 'question': its columns are question;answer"),
        ("q.json", '{"question": {"0": "a"}, "answer": {"0": "b"}}', r"write a list of objects.*orient='records'"),
        ("q.json", '[{"question": "a", "answer": "b"}, 3]', "row 2 is a int: expected a dict"),
        ("q.json", "[1, 2", "is not JSON"),
        ("q.json", "3", "does not hold a list of rows"),
        ("q.json", '{"data": [{"question": "a", "answer": "b"}]}', "does not hold a list of rows"),
        (
            "q.jsonl",
            '{"question": "a", "golden_answers": NaN}',
            "line 1 has no golden answer .'golden_answers' is None.: add at least one",
        ),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(QuestionsError, match=words) as caught:
        sr.load_questions(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_cell_of_text_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,title,text\n007,nan,1990.0\n")
    assert list(sr.load_corpus(tmp_path / "c.csv").passages()) == [sr.Passage("007", "nan", "1990.0")]


@pytest.mark.parametrize(
    ("source", "columns", "words"),
    [
        (
            ROWS,
            {"questoin": "question"},
            r"has the key 'questoin': the names of this package are question.*did you mean 'question'",
        ),
        (
            ROWS,
            {"question": "qustion"},
            "row 1 lacks the column 'qustion' that columns names: its columns are id, question",
        ),
        (ROWS, {"question": 3}, r"columns\['question'\] is 3"),
        (ROWS, {"question": ["q"]}, r"columns\['question'\] is \['q'\]"),
        ({"train": ROWS}, None, "is not a table: pass a file name"),
        (3, None, r"3 \(int\) is not a table"),
        (["nq", "popqa"], None, "row 1 is a str: expected a dict"),
        ([], None, "holds no questions"),
        ([*ROWS, 3], None, "row 3 is a int"),
    ],
)
def test_a_value_that_is_no_table_is_refused(source: Any, columns: Any, words: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=words):
        sr.load_questions(source, columns=columns)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([PASSAGES[0], {"id": 2, "text": float("nan")}], "passages, row 2 has a 'text' that is null"),
        ([PASSAGES[0], PASSAGES[0]], "row 2 has the same id '1' as row 1"),
        ([{"id": "1", "text": "half \ud83d"}], "row 1 has an invalid character"),
        (Dataset([{"id": "1", "body": "x"}]), r"the dataset, row 1 has no column 'text'.*columns="),
        (5, "5 .int. is not a table"),
    ],
)
def test_a_table_that_is_no_corpus_is_refused(source: Any, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        sr.load_corpus(source)


def test_a_dict_is_a_suite_for_each_name() -> None:
    assert [suite.name for suite in load_suites({"train": ROWS[:1], "test": ROWS[1:]})] == ["train", "test"]


def test_only_files_that_always_hold_rows_are_searched_for(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(FILES["q.jsonl"])
    (tmp_path / "config.json").write_text("{}")
    assert len(load_suites(tmp_path)) == 1


def test_a_similar_name_is_suggested() -> None:
    assert did_you_mean("question", ["Question"]) == " (did you mean 'Question'?)"
    assert did_you_mean("id", ["idea", "x"]) == ""
    assert did_you_mean("question", [3, "x"]) == ""


@pytest.mark.parametrize("name", ["q.txt", "q.gz", "csv", "jsonl.gz"])
def test_an_unknown_kind_of_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(TableError, match="does not have a supported file extension"):
        next(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa"])
@pytest.mark.parametrize("kind", ["polars", "like pandas", "pandas", "datasets"])
def test_real_suites_are_the_same_from_frames(name: str, kind: str) -> None:
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the optional file shared/data/{name}.jsonl beside the repository is missing")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def content(questions: tuple[sr.Question, ...]) -> list[Any]:
        """A frame has every column in every row; a file's row may lack one."""
        return [
            (each.id, each.question, each.golden_answers, {k: v for k, v in each.metadata.items() if v is not None})
            for each in questions
        ]

    table = pl.DataFrame(rows, infer_schema_length=None) if kind == "polars" else TABLES[kind](rows)
    assert content(sr.load_questions(table)) == content(sr.load_questions(path))


def test_the_real_corpus_is_the_same_from_a_frame() -> None:
    path = SHARED / "corpus.parquet"
    if not path.is_file():
        pytest.skip("the optional file shared/data/corpus.parquet beside the repository is missing")
    frame = pl.scan_parquet(path).head(5_000).collect()
    first = [(each.id, each.title, each.text) for each in next(sr.load_corpus(path).batches(5_000))]
    for kind in ("polars", "pandas", "datasets"):
        try:
            table = frame if kind == "polars" else TABLES[kind](frame.to_dicts())
        except pytest.skip.Exception:
            continue
        assert [(each.id, each.title, each.text) for each in sr.load_corpus(table).passages()] == first


class NAType:
    """As pandas' own missing value: it has no truth value, and equals nothing."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None  # type: ignore[assignment]


MISSING = [None, math.nan, np.float32("nan"), np.float64("nan"), Decimal("nan"), NAType()]


@pytest.mark.parametrize("value", MISSING, ids=lambda value: type(value).__name__)
def test_missing_values(value: Any) -> None:
    assert is_missing(value)
    assert plain_cell(["x", value]) == ["x", None]
    assert name_text(value) == ""


@pytest.mark.parametrize("value", ["", "nan", 0, False, [], np.array([math.nan]), math.inf])
def test_present_values(value: Any) -> None:
    assert not is_missing(value)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1990.0, "1990"),
        (np.float64(1990), "1990"),
        (np.int32(7), "7"),
        (np.float32(0.1), "0.1"),
        (-0.0, "0"),
        (1e-05, "0.00001"),
        (1e22, "10000000000000000000000"),
        (Decimal("3.50"), "3.5"),
        (True, None),
        (np.bool_(True), None),
        (math.inf, None),
        ("7", None),
    ],
)
def test_a_number_is_written_as_people_write_it(number: Any, text: str | None) -> None:
    assert number_text(number) == text


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_no_number_is_changed_by_its_text(number: float) -> None:
    text = number_text(number)
    assert text is not None
    assert float(text) == float(number) if isinstance(number, float) else int(text) == number
    assert "e" not in text


def test_arrays_become_lists() -> None:
    assert plain_cell({"a": np.array(["x", "y"], dtype=object), "b": (np.int8(3), np.float32(0.1))}) == {
        "a": ["x", "y"],
        "b": [3, 0.1],
    }
