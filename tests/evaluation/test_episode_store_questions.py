from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Question
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.episode_store import (
    QUESTIONS_NAME,
    questions_digest,
    questions_frame,
    questions_of,
    read_questions,
    write_parquet,
)
from searchr1_async.evaluation.stages import interleaved
from tests.watch.builders import HOSTILE


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_all_suites_are_spread_evenly(sizes: list[int]) -> None:
    order = interleaved(sizes)
    assert sorted(order) == list(range(sum(sizes)))
    starts = [sum(sizes[:suite]) for suite in range(len(sizes))]
    for start, size in zip(starts, sizes, strict=True):
        own = [place for place in order if start <= place < start + size]
        assert own == sorted(own), "a suite keeps its order"
        for begun in range(len(order) + 1):
            have = sum(start <= place < start + size for place in order[:begun])
            # Each other suite may be half a question ahead or behind.
            assert abs(have - begun * size / len(order)) <= 0.5 + len(sizes) * size / len(order)


def test_a_small_suite_does_not_wait_for_a_large_one() -> None:
    assert [number for number, place in enumerate(interleaved([100, 2])) if place >= 100] == [25, 76]


text = st.text(max_size=20)
questions = st.lists(
    st.builds(
        Question,
        id=st.text(min_size=1, max_size=8),
        question=st.text(min_size=1, max_size=20).filter(str.strip),
        golden_answers=st.lists(st.text(min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=3).map(tuple),
        data_source=st.sampled_from(["a", "b"]),
        metadata=st.dictionaries(text, st.one_of(st.none(), st.integers(-9, 9), text, st.lists(text, max_size=2))),
    ),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(questions)
def test_the_table_gives_the_questions_back(asked: list[Question]) -> None:
    assert questions_of(questions_frame(asked)) == tuple(asked)


def test_the_digest_tells_every_change_and_survives_the_disk(tmp_path: Path) -> None:
    asked = (Question("1", "who?", ("me", "I"), "a", {"hops": 2}), Question("2", HOSTILE, ("é",), "a"))
    frame = questions_frame(asked)
    digest = questions_digest(frame)
    changed = (
        questions_frame(asked[::-1]),
        questions_frame(asked[:1]),
        *(
            frame.with_columns(pl.when(pl.col("id") == "1").then(value).otherwise(pl.col(name)).alias(name))
            for name, value in (
                ("question", pl.lit("who? ")),
                ("suite", pl.lit("b")),
                ("metadata", pl.lit('{"hops": 3}')),
                ("golden_answers", pl.lit(["I", "me"])),
            )
        ),
    )
    assert len({digest, *map(questions_digest, changed)}) == 1 + len(changed)
    write_parquet(tmp_path / QUESTIONS_NAME, frame)
    assert questions_digest(read_questions(tmp_path)) == digest


def test_a_folder_without_them_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"questions\.parquet.*cannot be read"):
        read_questions(tmp_path)
    (tmp_path / QUESTIONS_NAME).write_bytes(b"PAR1 torn")
    with pytest.raises(RunFolderError, match=r"questions\.parquet.*cannot be read"):
        read_questions(tmp_path)


def test_lone_surrogates_are_kept_as_what_a_file_can_hold(tmp_path: Path) -> None:
    asked = [Question(f"id{HOSTILE}", f"who? {HOSTILE}", (HOSTILE, "a"), f"s{HOSTILE}", {HOSTILE: [HOSTILE]})]
    write_parquet(tmp_path / QUESTIONS_NAME, questions_frame(asked))
    read = questions_of(read_questions(tmp_path))
    kept = storable(HOSTILE)
    metadata = {joined(HOSTILE): [joined(HOSTILE)]}
    assert read == (Question(f"id{kept}", f"who? {kept}", (kept, "a"), f"s{kept}", metadata),)


def joined(text: str) -> str:
    return json.loads(json.dumps(text))


def test_what_is_asked_is_the_same_after_the_disk_where_metadata_hold_sets_and_odd_keys(tmp_path: Path) -> None:
    metadata: dict[Any, Any] = {"gold_passages": {"p2", "p1"}, ("a", 1): "x"}
    asked = [Question("1", "who?", ("me",), "a", metadata)]
    write_parquet(tmp_path / QUESTIONS_NAME, questions_frame(asked))
    (read,) = questions_of(read_questions(tmp_path))
    assert read.metadata == {"gold_passages": ["p1", "p2"], '["a", 1]': "x"}
    assert questions_digest(questions_frame([read])) == questions_digest(questions_frame(asked))
