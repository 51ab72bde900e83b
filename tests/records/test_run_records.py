from __future__ import annotations

import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1_async.episodes.table import (
    EPISODE_SCHEMA,
    GROUP_SCHEMA,
    TURN,
    EpisodeRow,
    episode_from_row,
    episodes_frame,
    storable,
)
from searchr1_async.episodes.types import Episode, Group, GroupOutcome, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.errors import RunFolderError
from searchr1_async.records.run_records import RunRecords
from tests.watch.builders import HOSTILE, answering_turn, episode, group, malformed_turn, question


def test_step_round_trips_as_rows(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    trained = group(question("q1", hop=2), (1.0, 0.0), failed=1)
    dropped = group(question("q2"), (1.0, 1.0))
    cancelled = Group(question("q3"), ())
    outcomes = [
        GroupOutcome(41, trained),
        GroupOutcome(40, dropped, "constant_reward"),
        GroupOutcome(39, cancelled, "too_slow"),
    ]
    records.write_step(1, outcomes, {"env/all/correct": 0.75})
    frame = records.episodes().collect()
    assert frame.schema == EPISODE_SCHEMA
    assert frame["question_id"].to_list() == ["q1", "q1", "q1", "q2", "q2"]
    assert frame["place"].to_list() == [41, 41, 41, 40, 40]
    assert frame["group"].to_list() == [0, 0, 0, 1, 1]
    assert frame["member"].to_list() == [0, 1, 2, 0, 1]
    assert frame["advantage"].to_list() == [0.5, -0.5, None, 0.0, 0.0]
    assert frame["trained"].to_list() == [True, True, False, False, False]
    assert frame["drop_reason"].to_list() == [None, None, "failed", "constant_reward", "constant_reward"]
    assert frame["error"].to_list()[2] == "SearchError: the store is gone"
    assert frame["policy_versions"].to_list()[0] == [1, 2]
    assert frame["token_count"].to_list()[0] == 5 + 3 + 4 + 2
    assert frame["ob_tokens"].to_list()[0] == 9
    assert "Paris is large." in frame["transcript"][0]
    passages = frame.select(pl.col("turns").list.first().struct.field("passages"))["passages"][0].to_list()
    assert passages == [[{"id": "p1", "title": "France", "text": "Paris is large.", "score": 0.75}]]
    assert records.metrics().to_dicts() == [{"step": 1, "env/all/correct": 0.75}]
    groups = records.groups().collect()
    assert groups.schema == GROUP_SCHEMA
    assert groups.drop("step").rows() == [
        (41, "q1", "atlas", True, None, 0.5, 1, 2, 2, 1),
        (40, "q2", "atlas", False, "constant_reward", 1.0, 1, 2, 2, 0),
        (39, "q3", "atlas", False, "too_slow", None, None, None, 0, 0),
    ]


def test_episodes_round_trip(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    asked = question("q1", hop=2)
    played = (
        episode(asked),
        episode(asked, correct=0.0, turns=(malformed_turn(),), stop_reason=StopReason.MALFORMED_CALL),
        episode(asked, turns=(answering_turn(),), parts={"style": 0.25}),
    )
    failed = (episode(asked, stop_reason=StopReason.FAILED, turns=()),)
    records.write_step(7, [GroupOutcome(0, Group(asked, played, failed))], {})
    assert records.load_episodes(7) == (*played, *failed)
    assert records.load_episodes(8) == ()


def test_given_passages_round_trip(tmp_path: Path) -> None:
    passages = (Passage("1", "Etna", "It burns.", 0.5), Passage("2", "", HOSTILE, 0.25))
    given = [
        SearchCall(("Which?",), (passages,), None, 0.25),
        SearchCall(("Which?",), ((),), None, 0.5),
        SearchCall((), problem="too long"),
        None,
    ]
    played = [replace(episode(question(f"q{place}")), given=call) for place, call in enumerate(given)]
    RunRecords(tmp_path).write_evaluation("rag", played)
    read = RunRecords(tmp_path).load_evaluation("rag")
    assert [each.given for each in read[1:]] == given[1:]
    first = read[0].given
    assert first is not None
    assert first.results[0][0] == passages[0]
    assert first.results[0][1].text == storable(HOSTILE)
    transcripts = RunRecords(tmp_path).evaluations().collect()["transcript"]
    assert "[given with the question]\n[search] Which?\n[passage] Etna: It burns." in transcripts[0]
    assert "[nothing] too long" in transcripts[2]
    assert "[given" not in transcripts[3]


def test_old_files_without_a_column_are_read_with_new_ones(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    for step in (1, 2, 3):
        records.write_step(step, [GroupOutcome(step, group(question(f"q{step}")))], {})
        if step != 2:  # the first and the last
            path = tmp_path / "episodes" / f"step-{step:06d}.parquet"
            pl.read_parquet(path).drop("given").write_parquet(path)
    frame = records.episodes().collect()
    assert frame.schema == EPISODE_SCHEMA
    assert frame["step"].to_list() == [1, 1, 2, 2, 3, 3]
    assert [episode_from_row(row).given for row in frame.iter_rows(named=True)] == [None] * 6
    assert records.load_episodes(1) == group(question("q1")).episodes
    assert records.load_episode(3, 0, 1) == group(question("q3")).episodes[1]


def test_old_files_without_sequence_ids_are_read_with_new_ones(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    for step in (1, 2):
        records.write_step(step, [GroupOutcome(step, group())], {})
    path = tmp_path / "episodes" / "step-000001.parquet"
    earlier = [field.name for field in TURN.fields if field.name not in ("sequence_id", "cached_prompt_tokens")]
    frame = pl.read_parquet(path)
    frame = frame.with_columns(pl.col("turns").list.eval(pl.struct(pl.element().struct.field(earlier))))
    frame.write_parquet(path)
    first = [episode_from_row(row).turns[0] for row in records.episodes().collect().iter_rows(named=True)]
    assert [turn.sequence_id for turn in first] == [None, None, "request-1:0", "request-1:0"]
    assert [turn.cached_prompt_tokens for turn in first] == [0, 0, 4, 4]
    assert records.load_episodes(1)[0].turns[0].sequence_id is None


def test_run_without_records_gives_empty_typed_frames(tmp_path: Path) -> None:
    records = RunRecords(tmp_path / "not yet")
    assert records.metrics().columns == ["step"]
    assert records.episodes().collect().schema == EPISODE_SCHEMA
    assert records.groups().collect().schema == GROUP_SCHEMA
    assert records.evaluations().collect().height == 0
    assert records.evaluation_labels() == ()
    assert records.load_evaluation("untrained") == ()
    records.truncate_after(0)


def test_steps_with_other_metrics_and_without_groups_concatenate(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.write_step(2, [], {"b": 2})
    records.write_step(1, [GroupOutcome(0, group())], {"a": 1, "step": 99})
    assert records.metrics().to_dicts() == [{"step": 1, "a": 1.0, "b": None}, {"step": 2, "a": None, "b": 2.0}]
    assert records.episodes().collect().height == 2


def test_truncate_after_the_resume_point(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    for step in (1, 2, 3):
        records.write_step(step, [GroupOutcome(0, group())], {"a": step})
    records.write_evaluation("untrained", [episode()], step=0)
    records.write_evaluation("midway", [episode()], step=3)
    records.write_evaluation("elsewhere", [episode()])
    (tmp_path / "episodes" / ".step-000003.parquet.4711").write_bytes(b"half")
    records.truncate_after(2)
    assert records.metrics()["step"].to_list() == [1, 2]
    assert records.episodes().collect()["step"].unique().sort().to_list() == [1, 2]
    assert records.groups().collect()["step"].to_list() == [1, 2]
    assert records.evaluation_labels() == ("untrained", "elsewhere")
    assert sorted(path.name for path in (tmp_path / "episodes").iterdir()) == [
        "step-000001.parquet",
        "step-000002.parquet",
    ]
    records.write_step(3, [GroupOutcome(0, group())], {"a": 30})
    assert records.metrics()["a"].to_list() == [1, 2, 30]


def test_evaluations_keep_order_and_replace_by_label(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    samples = [episode(question("q1")), episode(question("q2")), episode(question("q1"), correct=0.0)]
    records.write_evaluation("untrained", samples)
    records.write_evaluation("../../after RL!", [episode()], step=4)
    records.write_evaluation("After RL", [episode()])  # a label that differs only in case
    records.write_evaluation("untrained", samples[:2])
    assert records.evaluation_labels() == ("untrained", "../../after RL!", "After RL")
    assert records.load_evaluation("untrained") == tuple(samples[:2])
    frame = records.evaluations().collect()
    assert frame.height == 4
    assert {path.parent for path in tmp_path.rglob("*.parquet")} == {tmp_path / "evaluations"}
    records.write_evaluation("samples", samples)
    rows = records.evaluations().filter(pl.col("label") == "samples").collect()
    assert list(zip(rows["group"], rows["member"], strict=True)) == [(0, 0), (1, 0), (0, 1)]


def test_parts_named_by_the_first_version_are_read_and_replaced(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.write_evaluation("untrained", [episode(question("q1"))], 0)
    (part,) = (tmp_path / "evaluations").iterdir()
    old = part.rename(part.with_name("000-untrained.parquet"))
    records.write_evaluation("after RL", [episode(question("q1"))], 4)
    records.write_evaluation("untrained", [episode(question("q2"))], 0)
    assert [path.name for path in sorted((tmp_path / "evaluations").iterdir())] == [old.name, "000001.parquet"]
    assert records.evaluation_labels() == ("untrained", "after RL")
    assert [each.question.id for each in records.load_evaluation("untrained")] == ["q2"]


def test_full_disk_keeps_the_earlier_file(tmp_path: Path) -> None:
    """The OSError propagates, and no leftovers remain."""
    records = RunRecords(tmp_path)
    records.write_step(1, [GroupOutcome(0, group())], {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            records.write_step(1, [GroupOutcome(0, group(corrects=[1.0] * 9))], {"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert records.metrics()["a"].to_list() == [1]
    assert records.episodes().collect().height == 2
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"step-000001.parquet"}


def test_non_numeric_metric_is_rejected_before_writing(tmp_path: Path) -> None:
    bad: Any = {"a": "many"}
    with pytest.raises(ValueError, match="many"):
        RunRecords(tmp_path).write_step(1, [GroupOutcome(0, group())], bad)
    assert not list(tmp_path.rglob("*.parquet"))


def test_more_rows_than_one_chunk() -> None:
    played = [episode(turns=[answering_turn(sampled=index % 3)] * (index % 4)) for index in range(300)]
    frame = episodes_frame([EpisodeRow(played, member=index) for index, played in enumerate(played)])
    assert frame.schema == EPISODE_SCHEMA
    assert frame["member"].to_list() == list(range(300))
    assert [episode_from_row(row) for row in frame.iter_rows(named=True)] == played


def test_empty_and_null_lists_stay_distinct() -> None:
    def turn(call: SearchCall | None) -> Turn:
        return Turn((), (), "", call=call)

    found = (Passage("p", "t", "x", 0.5),)
    calls = (None, SearchCall(()), SearchCall(("a",)), SearchCall(("a", "b", "c"), ((), found * 2, found)), None)
    played = [episode(turns=()), episode(turns=[turn(call) for call in calls]), episode(turns=[turn(None)])]
    frame = episodes_frame([EpisodeRow(episode) for episode in played])
    assert [episode_from_row(row) for row in frame.iter_rows(named=True)] == played
    assert frame["turns"].to_list()[1][0]["queries"] is None
    assert frame["turns"].to_list()[1][1]["queries"] == []


def hostile_episode(text: str, number: float) -> Episode:
    """An episode with ``text`` in every untrusted field."""
    turn = Turn(
        (1, 2**31 - 1),
        (number, -0.0),
        text,
        text,
        0,
        SearchCall((text,), ((Passage(text, text, text, number),),), text),
    )
    asked = Question("q" + text, "?" + text, ("a" + text,), text, {"hop": text, text: [text, None, number]})
    return Episode(asked, (), (turn,), StopReason.FAILED, text, 0.0, {text: number, "correct": 1.0}, text)


@given(text=st.text(st.characters(), max_size=40), number=st.floats(width=32, allow_nan=False))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_text_is_storable_and_valid_text_round_trips(tmp_path: Path, text: str, number: float) -> None:
    written = hostile_episode(text, number)
    RunRecords(tmp_path).write_evaluation("hostile", [written])
    (read,) = RunRecords(tmp_path).load_evaluation("hostile")
    assert read.turns[0].text == storable(text)
    assert read.turns[0].sampled_tokens == written.turns[0].sampled_tokens
    if storable(text) == text:
        assert read == written


def test_surrogates_are_joined_or_replaced_and_nul_is_kept(tmp_path: Path) -> None:
    assert storable("\ud83d\ude00 \udcff \x00") == "😀 \ufffd \x00"
    RunRecords(tmp_path).write_step(
        1, [GroupOutcome(0, Group(question(), (hostile_episode(HOSTILE, 1.0),)), HOSTILE)], {HOSTILE: 1}
    )
    text = RunRecords(tmp_path).episodes().collect()["turns"][0][0]["text"]
    assert "\x00\x1b[31m \u202eevil\u202c 😀 \ufffd" in text
    assert RunRecords(tmp_path).metrics().width == 2


def test_single_row_round_trips() -> None:
    (row,) = episodes_frame([EpisodeRow(episode())]).iter_rows(named=True)
    assert episode_from_row(row) == episode()


@pytest.mark.parametrize(("name", "other"), [("lr[1]", "lr1"), ("lr?", "lrx"), ("lr*", "lr-all")])
def test_folder_names_are_not_globs(tmp_path: Path, name: str, other: str) -> None:
    """A neighbouring run is neither read nor deleted."""
    this, beside = RunRecords(tmp_path / name), RunRecords(tmp_path / other)
    for records, step in ((this, 1), (beside, 5)):
        records.write_step(step, [], {"reward": float(step)})
        records.write_evaluation("untrained", [episode()], step)
    assert this.metrics()["reward"].to_list() == [1.0]
    assert this.evaluations().select("step").collect()["step"].to_list() == [1]
    this.truncate_after(1)
    assert this.evaluation_labels() == ("untrained",), "its own evaluation is of step 1 and is kept"
    beside.truncate_after(1)
    assert (beside.evaluation_labels(), this.evaluation_labels()) == ((), ("untrained",))


# --- damaged files ------------------------------------------------------------------------------------------------------


def _foreign(path: Path) -> None:
    pl.DataFrame({"made": ["elsewhere"]}).write_parquet(path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("a file of another kind, long enough to be one"),
    "scrambled": lambda path: path.write_bytes(b"PAR1" + bytes(200) + b"PAR1"),
}


def recorded(folder: Path) -> RunRecords:
    records = RunRecords(folder)
    for step in (1, 2):
        records.write_step(step, [GroupOutcome(step, group())], {"env/all/correct": 0.5})
    records.write_evaluation("untrained", [episode()], 0)
    return records


@pytest.mark.parametrize("damage", [*DAMAGES, "foreign"])
def test_damaged_metrics_file_is_named_and_can_be_moved_away(tmp_path: Path, damage: str) -> None:
    records = recorded(tmp_path)
    file = tmp_path / "metrics" / "step-000001.parquet"
    ({**DAMAGES, "foreign": _foreign}[damage])(file)
    with pytest.raises(RunFolderError, match=re.escape(str(file))):
        records.metrics()
    file.unlink()
    assert records.metrics()["step"].to_list() == [2]


@pytest.mark.parametrize("damage", ["empty", "torn", "text"])
@pytest.mark.parametrize("kind", ["episodes", "groups", "evaluations"])
def test_damaged_episodes_file_is_named_before_collecting(tmp_path: Path, kind: str, damage: str) -> None:
    records = recorded(tmp_path)
    file = min((tmp_path / kind).iterdir())
    DAMAGES[damage](file)
    with pytest.raises(RunFolderError, match=re.escape(str(file))):
        getattr(records, kind)()


def test_damaged_evaluation_is_named(tmp_path: Path) -> None:
    records = recorded(tmp_path)
    (file,) = (tmp_path / "evaluations").iterdir()
    for damage in (*DAMAGES.values(), _foreign):
        damage(file)
        for read in (
            records.evaluation_labels,
            lambda: records.load_evaluation("untrained"),
            lambda: records.truncate_after(1),
        ):
            with pytest.raises(RunFolderError, match=re.escape(str(file))):
                read()


def test_damaged_episode_is_named(tmp_path: Path) -> None:
    records = recorded(tmp_path)
    (tmp_path / "episodes" / "step-000002.parquet").write_bytes(b"PAR1" + bytes(200) + b"PAR1")
    for read in (lambda: records.load_episodes(2), lambda: records.load_episode(2, 0, 0)):
        with pytest.raises(RunFolderError, match=r"step-000002\.parquet"):
            read()
    assert records.load_episodes(1)
