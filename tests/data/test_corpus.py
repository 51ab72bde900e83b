"""load_corpus: layouts, laziness, fingerprints, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1_async.data import corpus as corpus_module
from searchr1_async.data.corpus import Corpus, load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import CorpusError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [
    {"id": str(number), "title": f"title {number}", "text": f"text {number}\nmore", "src": "x"} for number in range(25)
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(params=["jsonl", "parquet", "passages"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    if request.param == "jsonl":
        return load_corpus(jsonl(tmp_path / "corpus.jsonl", ROWS))
    if request.param == "parquet":
        pl.DataFrame(ROWS).write_parquet(tmp_path / "corpus.parquet", row_group_size=7)
        return load_corpus(tmp_path / "corpus.parquet")
    return load_corpus([Passage(row["id"], row["title"], row["text"]) for row in ROWS])


def test_every_layout_is_the_same_corpus(corpus: Corpus) -> None:
    assert len(corpus) == 25
    assert corpus.fingerprint == load_corpus([Passage(r["id"], r["title"], r["text"]) for r in ROWS]).fingerprint
    assert next(corpus.passages()) == Passage("0", "title 0", "text 0\nmore")
    batches = list(corpus.batches(10))
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert [passage.id for batch in batches for passage in batch] == [row["id"] for row in ROWS]
    assert [[p.id for p in batch] for batch in corpus.batches(3, start=20)] == [["20", "21", "22"], ["23", "24"]]
    assert load_corpus(corpus) is corpus


def test_the_search_r1_layout(tmp_path: Path) -> None:
    rows = [{"id": 1, "contents": '"Moon"\nIt orbits.'}, {"id": 2, "contents": "no title"}]
    first, second = load_corpus(jsonl(tmp_path / "wiki.jsonl", rows)).passages()
    assert first == Passage("1", "Moon", "It orbits.")
    assert second == Passage("2", "", "no title")


def test_the_fingerprint_follows_the_content() -> None:
    def fingerprint(*fields: str) -> str:
        return load_corpus([Passage(*fields)]).fingerprint

    variants = [("1", "ab", "c"), ("1", "a", "bc"), ("1a", "b", "c"), ("2", "ab", "c")]
    assert len({fingerprint(*fields) for fields in variants}) == 4
    pair = [Passage("1", "", "a"), Passage("2", "", "b")]
    assert load_corpus(pair).fingerprint != load_corpus(pair[::-1]).fingerprint


def test_a_file_is_read_whole_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "corpus.jsonl", ROWS)
    first = load_corpus(path).fingerprint

    def read_again(*_: object) -> None:
        raise AssertionError("the file was read again")

    with monkeypatch.context() as patched:
        patched.setattr(corpus_module, "_read_whole", read_again)
        assert load_corpus(path).fingerprint == first
        assert len(load_corpus(path)) == 25
    jsonl(path, ROWS[:-1])
    os.utime(path, ns=(1, 1))
    assert load_corpus(path).fingerprint != first


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no passages"),
        ([{"id": "1", "title": "t"}], "line 1 has no column 'text'"),
        ([{"title": "t"}], "no column 'id'"),
        ([{"id": None, "text": "t"}], "line 1 has no 'id'"),
        ([ROWS[0], {"id": "1", "text": None}], "line 2 has a 'text' that is null"),
        ([ROWS[0], {"id": "1", "text": " \n"}], "line 2 has a 'text' that is blank"),
        ([ROWS[0], {"id": "1", "text": 5}], "line 2 has a 'text' that is a int"),
        ([*ROWS, ROWS[3]], "line 26 has the same id '3' as .*line 4|line 26 has the same id '3' as line 4"),
        ([ROWS[0], 3], "line 2 is a int: expected a dict"),
    ],
)
def test_an_error_names_its_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(CorpusError, match=message) as caught:
        load_corpus(path).check()
    assert "bad.jsonl" in str(caught.value)


def test_passages_are_checked_at_once() -> None:
    for passages, message in (
        ([], "holds no passages"),
        ([Passage("", "", "x")], "has no id"),
        ([Passage("1", "", " ")], "has no text"),
        ([Passage("1", "", "x"), Passage("1", "", "y")], "same id"),
    ):
        with pytest.raises(CorpusError, match=message):
            load_corpus(passages)


def test_names_and_places(tmp_path: Path) -> None:
    (tmp_path / "fake.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "c.txt").write_text("text")
    for name, message in {
        "missing.parquet": "does not exist",
        "fake.parquet": "cannot be read",
        "c.txt": "does not have a supported file extension",
        "": "is a folder",
    }.items():
        with pytest.raises(CorpusError, match=message):
            load_corpus(tmp_path / name)
    with pytest.raises(CorpusError, match="unknown corpus 'wiki'"):
        load_corpus("wiki")


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                name: st.none() | st.integers() | st.text(max_size=5) for name in ("id", "title", "text", "contents")
            },
        ),
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_give_passages_or_a_clear_refusal(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = jsonl(tmp_path / "any.jsonl", rows)
    try:
        corpus = load_corpus(path)
        corpus.check()
    except CorpusError as error:
        assert str(path) in str(error)  # noqa: PT017  (either outcome is right)
    else:
        passages = list(corpus.passages())
        assert len(passages) == len(corpus) == len(rows)
        assert all(passage.id and passage.text.strip() for passage in passages)


def test_the_real_corpus() -> None:
    path = SHARED / "corpus.parquet"
    if not path.is_file():
        pytest.skip("the optional file shared/data/corpus.parquet beside the repository is missing")
    corpus = load_corpus(path)
    assert len(corpus) == 54_909
    assert all(passage.text for passage in next(corpus.batches(500, start=54_000)))
