"""load_questions: every layout of the field, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import importlib
import json
import operator
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1_async.data.hub import SUITES
from searchr1_async.data.questions import load_questions
from searchr1_async.data.suites import load_suite, load_suites
from searchr1_async.errors import ConfigurationError, QuestionsError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_plain_layout(tmp_path: Path) -> None:
    rows = [
        {
            "id": 7,
            "question": " who? ",
            "golden_answers": ["Ann", "Ann", " "],
            "data_source": "nq",
            "type": "x",
            "gold_passages": ["p1"],
        },
        {"question": "what\u2028now?", "golden_answers": "that"},
    ]
    first, second = load_questions(jsonl(tmp_path / "mine.jsonl", rows))
    assert (first.id, first.question, first.golden_answers, first.data_source) == ("7", "who?", ("Ann",), "nq")
    assert first.metadata == {"type": "x", "gold_passages": ("p1",)}
    assert (second.question, second.golden_answers, second.data_source) == ("what\u2028now?", ("that",), "mine")
    assert second.id.startswith("mine/")


def test_ids_made_from_content_survive_a_change_of_order(tmp_path: Path) -> None:
    rows = [{"question": f"q{number % 3}", "golden_answers": ["a"]} for number in range(4)]
    ids = [question.id for question in load_questions(jsonl(tmp_path / "q.jsonl", rows))]
    turned = [question.id for question in load_questions(jsonl(tmp_path / "q.jsonl", rows[::-1]))]
    assert len(set(ids)) == 4
    assert set(ids) == set(turned)
    assert ids[1:3] == turned[1:3][::-1]


def test_the_recipe_s_parquet(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"train_{number}",
            "question": f"question {source} {number}?",
            "golden_answers": answers,
            "data_source": source,
            "prompt": [{"role": "user", "content": "…"}],
            "ability": "fact-reasoning",
            "reward_model": {"ground_truth": {"target": ["a", "b"]}, "style": "rule"},
            "extra_info": {"index": number, "split": "train"},
        }
        for source in ("nq", "hotpotqa")
        for number, answers in enumerate((["a", "b"], None))
    ]
    path = tmp_path / "train.parquet"
    pl.DataFrame(rows).write_parquet(path)
    questions = load_questions(path)
    assert [question.golden_answers for question in questions] == [("a", "b")] * 4
    # The recipe numbers each source from 0.
    assert [question.id for question in questions] == [
        "nq/train_0",
        "nq/train_1",
        "hotpotqa/train_0",
        "hotpotqa/train_1",
    ]
    assert questions[0].metadata["extra_info"] == {"index": 0, "split": "train"}
    assert "prompt" not in questions[0].metadata


@pytest.mark.parametrize(
    ("ground_truth", "answers"),
    [
        ({"target": ["a", "b"]}, ("a", "b")),
        ({"target": "a"}, ("a",)),
        (["a"], ("a",)),
        ("a", ("a",)),
        (1912, ("1912",)),
    ],
)
def test_the_shapes_of_a_ground_truth(tmp_path: Path, ground_truth: Any, answers: tuple[str, ...]) -> None:
    rows = [{"question": "q", "reward_model": {"ground_truth": ground_truth}}]
    assert load_questions(jsonl(tmp_path / "q.jsonl", rows))[0].golden_answers == answers


def test_flashrag(tmp_path: Path) -> None:
    rows = [
        {"id": "test_0", "question": "q", "golden_answers": ["a"], "metadata": {"type": "bridge", "context": ["x"]}}
    ]
    (question,) = load_questions(jsonl(tmp_path / "musique.jsonl", rows))
    assert (question.data_source, question.metadata) == ("musique", {"type": "bridge", "context": ("x",)})


def test_compressed_with_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff\n{"question": "q", "golden_answers": ["a"]}\r\n\r\n'.encode()))
    assert len(load_questions(path)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no questions"),
        ("\n\n", "holds no questions"),
        ('{"question": "q", "golden_answers": ["a"]}\n{oops', "line 2 is not JSON"),
        ("[1, 2]", "line 1 is a list: expected a dict"),
        (
            '{"query": "q", "golden_answers": ["a"]}',
            "line 1 has no column 'question': its columns are query, golden_answers",
        ),
        ('{"question": null, "golden_answers": ["a"]}', "line 1 has a 'question' that is not text"),
        ('{"question": "  ", "golden_answers": ["a"]}', "line 1: question .* has no text"),
        ('{"question": "q"}', "line 1 has no golden answer in"),
        ('{"question": "q", "golden_answers": []}', "line 1 has no golden answer"),
        ('{"question": "q", "golden_answers": ["", null]}', "line 1 has no golden answer"),
        (
            '{"id": 1, "question": "q", "golden_answers": ["a"]}\n{"id": "1", "question": "r", "golden_answers": ["a"]}',
            "line 2 has the same id '1' as line 1",
        ),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_an_error_names_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(QuestionsError, match=message) as caught:
        load_questions(path)
    assert "bad.jsonl" in str(caught.value)


def test_files_without_data(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9", "golden_answers": ["a"]}')
    (tmp_path / "fake.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "q.jsonl.gz").write_bytes(b"not gzip")
    packed = gzip.compress(b'{"question": "q", "golden_answers": ["a"]}\n' * 1000)
    (tmp_path / "broken.jsonl.gz").write_bytes(packed[:20] + b"\xff" * 8 + packed[28:])
    (tmp_path / "q.txt").write_text("question,answer")
    for name, message in {
        "latin.jsonl": "UTF-8",
        "fake.parquet": "cannot be read",
        "q.jsonl.gz": "cannot be read",
        "broken.jsonl.gz": "cannot be read",
        "q.txt": "does not have a supported file extension",
        "missing.jsonl": "does not exist",
        "": "is a folder",
    }.items():
        with pytest.raises(QuestionsError, match=message):
            load_questions(tmp_path / name)


def test_names_limits_and_splits(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{number}", "golden_answers": ["a"], "split": "dev" if number < 3 else "test"}
        for number in range(5)
    ]
    path = jsonl(tmp_path / "q.jsonl", rows)
    assert [question.question for question in load_questions(path, split="test")] == ["q3", "q4"]
    assert len(load_questions(path, limit=2)) == 2
    for call, message in (
        ({"name_or_path": path, "split": "train"}, "of split 'train'"),
        ({"name_or_path": "no such suite"}, "unknown questions"),
        ({"name_or_path": "atlas", "split": "test"}, "no split 'test'"),
    ):
        with pytest.raises(QuestionsError, match=message):
            load_questions(**call)
    with pytest.raises(QuestionsError, match="no column 'split'"):
        load_questions(jsonl(tmp_path / "r.jsonl", [{"question": "q", "golden_answers": ["a"]}]), split="test")


def test_the_same_rows_are_the_same_questions_in_every_container() -> None:
    """Ids are made from the content: a run that was begun with a frame goes on with a list of what it holds."""
    rows = [{"question": f"q{number}", "answer": ["a", "b"]} for number in range(3)]
    frame, found = pl.DataFrame(rows), load_questions(rows)
    same = [frame, frame.lazy(), iter(rows), tuple(rows)]
    for module, make in (("pandas", "DataFrame"), ("pyarrow", "Table.from_pylist"), ("datasets", "Dataset.from_list")):
        try:
            made = operator.attrgetter(make)(importlib.import_module(module))
        except ImportError:
            continue
        same.append(made(rows))
    for source in same:
        assert load_questions(source) == found, type(source)
    assert found[0].data_source == "table"


@pytest.mark.parametrize("read", [load_questions, load_suites, load_suite])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"limit": "3"}, "limit is '3' (str): it should be a valid integer"),
        ({"limit": 3.0}, "limit is 3.0 (float): it should be a valid integer"),
        ({"limit": True}, "limit is True (bool): it should be a valid integer"),
        ({"seed": "one"}, "seed is 'one' (str): it should be a valid integer"),
    ],
)
def test_a_limit_and_a_seed_are_whole_numbers(read: Any, wrong: dict[str, Any], message: str) -> None:
    rows = [{"question": f"q{number}", "answer": "a"} for number in range(5)]
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        read(rows, **wrong)
    assert len(load_questions(rows, limit=np.int64(2), seed=np.int32(1))) == 2


@pytest.mark.parametrize("name", ["musique", "PeterJinGo/nq_hotpotqa_train"])
def test_an_unreachable_hub_is_reported(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(QuestionsError, match=r"cannot be reached.*atlas"):
        load_questions(name)
    assert "musique" in SUITES


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["id", "question", "golden_answers", "data_source", "reward_model", "metadata", "split"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(max_size=8),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["ground_truth", "target", "x"]), inner, max_size=2)
                ),
                max_leaves=6,
            ),
        ),
        max_size=5,
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_give_questions_or_a_clear_refusal(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    try:
        questions = load_questions(path)
    except QuestionsError as error:
        assert str(path) in str(error)  # noqa: PT017  (either outcome is right)
    else:
        assert len(questions) == len(rows)
        assert len({question.id for question in questions}) == len(questions)
        assert all(question.id and question.question.strip() and question.golden_answers for question in questions)


@pytest.mark.parametrize(
    ("name", "count"),
    [("nq", 3310), ("triviaqa", 1188), ("popqa", 1921), ("hotpotqa", 1517), ("2wikimultihopqa", 1728)],
)
def test_real_suites(name: str, count: int) -> None:
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the optional file shared/data/{name}.jsonl beside the repository is missing")
    questions = load_questions(path)
    assert len(questions) == count
    assert {question.data_source for question in questions} == {name}


@pytest.mark.parametrize(("name", "other"), [("nq[1]", "nq1"), ("nq?", "nqx"), ("nq*", "nq-all")])
def test_no_character_of_a_file_s_name_is_a_wildcard(tmp_path: Path, name: str, other: str) -> None:
    for each in (other, name):
        frame = pl.DataFrame({"id": [each], "question": ["q"], "golden_answers": [["a word"]]})
        with (tmp_path / f"{each}.parquet").open("wb") as file:
            frame.write_parquet(file)
    assert [question.id for question in load_questions(tmp_path / f"{name}.parquet")] == [name]
    (tmp_path / f"{name}.parquet").unlink()
    with pytest.raises(QuestionsError, match=r"the questions file .* does not exist"):
        load_questions(tmp_path / f"{name}.parquet")
