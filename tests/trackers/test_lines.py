"""Encoding and decoding of event lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async import events
from searchr1_async.events import (
    BatchClosed,
    EpisodeFinished,
    Event,
    GroupDropped,
    GroupFinished,
    RunStarted,
    StepFinished,
)
from searchr1_async.trackers.tracker import (
    LoggedEvent,
    decoded,
    encoded,
    plain,
    read_events,
)
from tests.watch import builders


def test_episode_is_summarised_without_text() -> None:
    question = builders.question("q7", "atlas")
    line = encoded(12.3456, EpisodeFinished(builders.episode(question), step=3))
    row = orjson.loads(line)
    assert row["time"] == 12.346
    assert row["event"] == "EpisodeFinished"
    assert (row["question_id"], row["data_source"], row["step"]) == ("q7", "atlas", 3)
    assert (row["reward"], row["correct"], row["turns"], row["stop_reason"]) == (1.0, 1.0, 2, "answer")
    assert row["policy_versions"] == [1, 2]
    assert question.question.encode() not in line
    assert b"Paris" not in line


def test_group_is_summarised() -> None:
    row = orjson.loads(
        encoded(1.0, GroupDropped(builders.group(corrects=(1.0, 0.0, 0.0), failed=2), 4, "constant_reward"))
    )
    assert (row["episodes"], row["failed"], row["reason"], row["step"]) == (3, 2, "constant_reward", 4)
    assert row["reward"] == pytest.approx(1 / 3)
    assert orjson.loads(encoded(1.0, GroupFinished(builders.group(corrects=()), 1)))["reward"] is None


def test_hostile_text_and_non_finite_numbers_give_valid_json() -> None:
    line = encoded(1.0, StepFinished(1, {builders.HOSTILE: math.nan, "infinite": math.inf, "fine": 0.5}))
    assert line.count(b"\n") == 1
    assert json.loads(line)["metrics"]["fine"] == 0.5
    assert json.loads(line)["metrics"]["infinite"] is None
    text = encoded(1.0, EpisodeFinished(builders.episode(builders.question("x" * 1_000_000)), 1))
    assert len(text) < 20_000, "huge texts are truncated"


def test_every_event_type_can_be_encoded() -> None:
    """Each event type is built with values that fit its fields; a field that JSON lacks would break the log."""
    values = {
        "str": "text", "str | None": "text", "int": 1, "int | None": None, "float": 0.5, "float | None": 0.5, "bool": True,
        "Episode": builders.episode(), "Group": builders.group(), "Mapping[str, float]": {"a": 1.0},
        "Mapping[str, Any]": {"a": (1, Path("x"))},
    }  # fmt: skip
    kinds = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)]
    assert len(kinds) > 15
    for kind in kinds:
        made = kind(**{name: values.get(kind.__annotations__[name], "other") for name in kind.__struct_fields__})
        event = decoded(encoded(2.0, made))
        assert event is not None
        assert (event.time, event.name) == (2.0, kind.__name__)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(json_like)
def test_any_settings_round_trip(settings: object) -> None:
    event = RunStarted("train", "m", True, "hash", settings={"given": settings})
    read = decoded(encoded(1.0, event))
    assert read is not None
    assert read.values["settings"] == plain({"given": settings})


@given(st.binary(max_size=200))
def test_any_line_decodes_to_an_event_or_none(line: bytes) -> None:
    found = decoded(line)
    assert found is None or isinstance(found, LoggedEvent)


def test_truncated_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = encoded(1.0, BatchClosed(1, 4))
    path.write_bytes(
        whole + b"not json\n" + b'{"time": "x", "event": "A"}\n' + encoded(2.0, BatchClosed(2, 4)) + whole[:-5]
    )
    assert [(event.time, event.values["step"]) for event in read_events(path)] == [(1.0, 1), (2.0, 2)]
    assert list(read_events(tmp_path / "none.jsonl")) == []
