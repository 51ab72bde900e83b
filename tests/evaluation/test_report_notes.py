from __future__ import annotations

import polars as pl

from searchr1_async.data.hub import SUITES
from searchr1_async.evaluation.manifest import SystemRecord
from searchr1_async.evaluation.report import Report
from searchr1_async.evaluation.report_notes import NOT_STATED, PUBLISHED, PublishedRow
from tests.evaluation.reports import manifest, report, rows_of


def ours(*suites: str, **changes: object) -> Report:
    bare = report(ours=[row for suite in suites for row in rows_of(suite, 30, 100)])
    return Report(list(bare.values()), manifest(bare, **changes))


def test_the_published_rows_are_those_of_their_source() -> None:
    percents = {row.name: [round(100 * score, 1) for score in row.scores.values()] for row in PUBLISHED if row.scores}
    assert percents == {
        "Search-R1 paper": [42.9, 62.3, 42.7, 38.6, 34.6, 16.2, 40.0],
        "Search-R1 paper, PPO": [48.0, 63.8, 45.7, 43.3, 38.2, 19.6, 43.2],
        "GiGPO": [46.4, 64.7, 46.1, 41.6, 43.6, 18.9, 68.9],
        "Thinker": [45.0, 64.2, 48.4, 42.1, 46.9, 22.1, 48.0],
        "GSPO + LLDS, 3B": [48.9, 64.0, 46.6, 45.6],
        "Tinker replication": [51.6, 67.3, 49.7, 42.8],
        "tinker-cookbook": [51.8, 70.2, 52.0, 47.7],
    }
    four, seven = ["nq", "triviaqa", "hotpotqa", "2wikimultihopqa"], list(SUITES)
    assert all(list(row.scores) in ([], four, seven) for row in PUBLISHED)
    assert {row.name: row.mean for row in PUBLISHED if not row.scores} == {
        "Search-E1, 3B": 0.44,
        "IG-Search, 3B": 0.43,
        "GiGPO, 3B": 0.421,
        "TIPS, 4B": 0.484,
        "IGRPO": 0.482,
        "IG-Search, Instruct": 0.479,
        "GrepSeek, 9B": 0.495,
        "TIPS, 14B": 0.454,
    }
    assert all(row.source.startswith("https://") for row in PUBLISHED)


def test_only_the_suites_that_both_have_stand_beside_each_other() -> None:
    frame = ours("nq", "atlas").beside().frame
    assert frame["suite"].unique().to_list() == ["nq"]
    assert frame.row(0, named=True)["kind"] == "ours"
    assert frame.filter(kind="published")["low"].null_count() == len([row for row in PUBLISHED if row.scores])
    assert ours("atlas").beside().frame.height == 0
    assert ours("atlas").beside().notes == ()


def test_the_conditions_show_what_differs_and_what_nobody_states() -> None:
    found = ours("nq").beside()
    assert "not ranked" in found.notes[0]
    assert any(
        note.startswith("Tinker replication, tinker-cookbook: Its source does not state") for note in found.notes
    )
    conditions = {row[0]: row[1:] for row in found.conditions.iter_rows()}
    assert conditions["corpus"][0] == "corpus.parquet (54,909 passages)"
    assert conditions["passages per search"] == ("3", "3", "3", NOT_STATED, NOT_STATED, NOT_STATED, "3", "3")
    assert conditions["temperature"] == ("0", *[NOT_STATED] * len(found.conditions.columns[2:]))


def test_rows_with_a_mean_alone_stand_beside_all_seven_suites() -> None:
    means = {row.name for row in PUBLISHED if not row.scores}
    assert means
    assert not means & set(ours("nq", "hotpotqa").beside().conditions.columns)
    assert means <= set(ours(*SUITES).beside().conditions.columns)


def test_turns_are_those_that_each_system_may_take() -> None:
    bare = report(**{name: rows_of("nq", 3, 9) for name in ("common", "own", "direct")})
    records = (
        SystemRecord("common", "search", "tiny/tiny-1M"),
        SystemRecord("own", "search", "tiny/tiny-1M", limits={"max_turns": 9, "max_tokens": 64}),
        SystemRecord("direct", "direct", "tiny/tiny-1M", limits={"max_turns": 9, "max_tokens": 64}),
    )
    conditions = Report(list(bare.values()), manifest(bare, systems=records)).beside().conditions
    turns = conditions.row(by_predicate=pl.col("condition") == "max turns", named=True)
    assert [turns[label] for label in bare] == ["5", "9", "1"]


def test_without_a_manifest_nothing_is_claimed() -> None:
    found = report(ours=rows_of("nq", 30, 100)).beside()
    assert set(found.conditions["ours"].to_list()[:-3]) == {NOT_STATED}


def test_a_row_of_ones_own_stands_beside() -> None:
    twin = PublishedRow("twin", {"nq": 0.3}, "https://example.org", model="tiny-1M", temperature=0.0)
    found = ours("nq").beside([twin])
    assert found.frame["row"].to_list() == ["ours", "twin"]
    assert found.conditions["twin"].to_list()[0] == "tiny-1M"
