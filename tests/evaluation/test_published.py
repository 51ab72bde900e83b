from __future__ import annotations

import dataclasses

import polars as pl

from searchr1_async.data.questions import SUITES
from searchr1_async.evaluation.manifest import SystemRecord
from searchr1_async.evaluation.published import NOT_RECORDED, NOT_STATED, PUBLISHED, PublishedRow
from searchr1_async.evaluation.report import Report
from tests.evaluation.reports import manifest, report, rows_of


def ours(*suites: str, **changes: object) -> Report:
    bare = report(ours=[row for suite in suites for row in rows_of(suite, 30, 100)])
    return Report(list(bare.values()), manifest(bare, **changes))


def test_the_published_rows_are_those_of_their_source() -> None:
    percents = {row.name: [round(100 * score, 1) for score in row.scores.values()] for row in PUBLISHED}
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
    assert all(list(row.scores) == (four if len(row.scores) == 4 else seven) for row in PUBLISHED)
    assert all(row.source.startswith("https://") for row in PUBLISHED)


def test_only_the_suites_that_both_have_stand_beside_each_other() -> None:
    frame = ours("nq", "atlas").beside().frame
    assert frame["suite"].unique().to_list() == ["nq"]
    assert frame.row(0, named=True)["kind"] == "ours"
    assert frame.filter(kind="published")["low"].null_count() == len(PUBLISHED)
    assert ours("atlas").beside().frame.height == 0
    assert ours("atlas").beside().notes == ()


def test_the_notes_say_what_differs_and_what_nobody_states() -> None:
    found = ours("nq").beside()
    note = next(note for note in found.notes if note.startswith("Search-R1 paper: Ours differs"))
    for part in (
        "model (tiny/tiny-1M; theirs: Qwen2.5-7B-Instruct)",
        "embedder (minilm; theirs: E5)",
        "54,909 passages",
    ):
        assert part in note
    assert "passages per search" not in note  # three on both sides
    assert "does not state max turns, samples per question, temperature, number of questions" in note
    assert note.endswith("not ranked.")
    conditions = {row[0]: row[1:] for row in found.conditions.iter_rows()}
    assert conditions["passages per search"] == ("3", "3", "3", NOT_STATED, NOT_STATED, NOT_STATED, "3", "3")
    assert conditions["temperature"] == ("0", *[NOT_STATED] * len(PUBLISHED))


def test_a_difference_of_one_system_names_it() -> None:
    bare = report(with_search=rows_of("nq", 3, 9), without=rows_of("nq", 1, 9))
    records = (SystemRecord("with search", "recipe", "tiny/tiny-1M"), SystemRecord("without", "direct", "tiny/tiny-1M"))
    found = Report(list(bare.values()), manifest(bare, systems=records)).beside()
    note = next(note for note in found.notes if note.startswith("tinker-cookbook"))
    assert "prompt (ours, without search for without; theirs: recipe)" in note
    assert "passages per search (none for without; theirs: 3)" in note


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
    assert len(found.notes) == 1
    assert "not recorded" in found.notes[0]
    assert set(found.conditions["ours"].to_list()[:-1]) == {NOT_RECORDED}


def test_only_where_everything_is_known_and_alike_may_a_figure_be_ranked() -> None:
    twin = PublishedRow(
        "twin", {"nq": 0.3}, "https://example.org", model="tiny-1M", training="none: the base model",
        corpus="corpus.parquet (54,909 passages)", embedder="minilm", n_results=3, prompt="ours, with the search tool",
        max_turns=5, questions="nq 100", samples=1, temperature=0.0,
    )  # fmt: skip
    assert ours("nq").beside([twin]).notes == ("twin: No known difference.",)
    other = dataclasses.replace(twin, questions="nq 3,610")
    assert "not ranked" in ours("nq").beside([other]).notes[0]
    silent = dataclasses.replace(twin, samples=None)
    assert ours("nq").beside([silent]).notes[0].endswith("not ranked.")
