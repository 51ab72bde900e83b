from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl
import pytest

from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.report import Report
from searchr1_async.runs.evaluation import Evaluation, compare
from tests.evaluation.reports import evaluation, manifest, report, rows_of


def two_suites(nq: int, hotpotqa: int, of: int = 100) -> list[tuple[str, str, float | None]]:
    return [*rows_of("nq", nq, of), *rows_of("hotpotqa", hotpotqa, of // 2)]


def test_it_is_a_mapping_in_the_order_of_the_systems() -> None:
    found = report(untrained=two_suites(10, 5), after_RL=two_suites(60, 25))
    assert list(found) == ["untrained", "after RL"]
    assert found["after RL"].exact_match == pytest.approx(85 / 150)
    assert isinstance(found["untrained"], Evaluation)
    assert found.suites == ("nq", "hotpotqa")
    assert found.columns == ("nq", "hotpotqa", "all", "macro")
    with pytest.raises(KeyError):
        found["nobody"]


def test_the_only_evaluation_is_that_of_one_system() -> None:
    one = report(untrained=two_suites(10, 5))
    assert one.only is one["untrained"]
    assert one.only.exact_match == pytest.approx(15 / 150)
    with pytest.raises(ConfigurationError, match="2 systems"):
        report(a=two_suites(1, 1), b=two_suites(1, 1)).only  # noqa: B018
    with pytest.raises(ConfigurationError, match="the same label"):
        Report([evaluation("a", rows_of("nq", 1, 2)), evaluation("a", rows_of("nq", 1, 2))])


def test_frames_hold_what_the_evaluations_say() -> None:
    found = report(untrained=two_suites(10, 5), after_RL=two_suites(60, 25))
    frame = found.frame()
    assert frame.columns == ["system", "suite", "metric", "mean", "low", "high", "questions", "episodes"]
    row = frame.row(
        by_predicate=(pl.col("system") == "after RL") & (pl.col("suite") == "nq") & (pl.col("metric") == "exact_match")
    )
    assert row[3:] == (0.6, *found["after RL"].estimate("exact_match", "nq")[1:], 100, 100)
    wide = found.table()
    assert wide.columns == ["system", "nq", "hotpotqa", "all", "macro"]
    assert wide.row(1) == ("after RL", 0.6, 0.5, pytest.approx(85 / 150), pytest.approx(0.55))
    with pytest.raises(ConfigurationError, match="no metric"):
        found.table("beauty")


def test_a_system_that_was_not_asked_a_suite_has_no_figure_there() -> None:
    found = report(a=two_suites(10, 5), b=rows_of("nq", 50, 100))
    assert found.table()["hotpotqa"].to_list() == [0.1, None]
    assert found.comparisons().height == 0
    assert any("Not compared with a, because the questions differ: b" in note for note in found.notes())
    assert "–" in repr(found)


def test_comparisons_are_paired_and_adjusted() -> None:
    found = report(base=two_suites(10, 5), same=two_suites(11, 5), better=two_suites(60, 25))
    frame = found.comparisons()
    assert frame.select("before", "after", "suite").rows() == [
        ("base", after, suite) for after in ("same", "better") for suite in ("nq", "hotpotqa", "all", "macro")
    ]
    row = frame.row(by_predicate=(pl.col("after") == "better") & (pl.col("suite") == "all"), named=True)
    expected = compare(found["base"], found["better"])
    assert (row["difference"], row["low"], row["high"]) == (expected.mean, *expected.interval)
    assert (row["better"], row["worse"], row["questions"]) == (70, 0, 150)
    overall = frame.filter(suite="all").sort("p_value")
    smallest, largest = overall["p_value"].to_list()
    assert overall["p_holm"].to_list() == pytest.approx([2 * smallest, max(2 * smallest, largest)])
    against = found.comparisons("better").filter(suite="all")
    assert against.select("before", "after").rows() == [("better", "base"), ("better", "same")]
    assert against["difference"].to_list()[0] == -row["difference"]
    with pytest.raises(ConfigurationError, match="no system 'nobody'"):
        found.comparisons("nobody")


def test_only_differences_that_chance_does_not_explain_are_marked() -> None:
    clear = report(base=two_suites(10, 5), better=two_suites(60, 25)).markdown()
    assert clear.count("**\\+") == 4
    close = report(base=two_suites(50, 25), better=two_suites(53, 26)).markdown()
    assert "**" not in close


def test_flips_are_those_of_the_two_systems() -> None:
    found = report(base=rows_of("nq", 3, 10), after=[*rows_of("nq", 0, 1), *rows_of("nq", 10, 10)[1:]])
    flips = found.flips("base", "after")
    assert flips.filter(direction="worsened")["question_id"].to_list() == ["q0"]
    assert flips.filter(direction="improved").height == 7
    with pytest.raises(ConfigurationError, match="no system"):
        found.flips("base", "nobody")


def test_costs_are_priced_by_the_model_where_its_price_is_known() -> None:
    bare = report(a=two_suites(10, 5))
    assert bare.costs()["cost"].unique().to_list() == ["unknown"]
    here = Report(list(bare.values()), manifest(bare))
    assert here.costs()["cost"].unique().to_list() == ["nothing: this machine"]
    cloud = manifest(bare, service={"embedded": False})
    system = dataclasses.replace(cloud.systems[0], model="Qwen/Qwen3-8B")
    priced = Report(list(bare.values()), dataclasses.replace(cloud, systems=(system,)))
    row = priced.costs().row(-1, named=True)
    assert row["suite"] == "all"
    assert row["dollars_total"] == pytest.approx(150 * (1000 * 0.195 + 100 * 0.60) / 1e6)
    assert row["dollars"] == pytest.approx(row["dollars_total"] / 150)
    assert (row["turns"], row["searches"], row["prompt_tokens"]) == (2, 1, 1000)
    lost = evaluation("a", [*two_suites(10, 5), ("nq", "lost", None)], cached_prompt_tokens=800)
    row = Report([lost], dataclasses.replace(cloud, systems=(system,))).costs().row(-1, named=True)
    assert row["episodes"] == 150
    billed = 151 * (200 * 0.195 + 800 * 0.039 + 100 * 0.60)
    assert row["dollars_total"] == pytest.approx(billed / 1e6), "a failed episode's turns are billed too"
    own = dataclasses.replace(cloud, systems=(system,), service={"embedded": False, "host": "127.0.0.1"})
    assert Report([lost], own).costs()["dollars"].null_count() == 3, "a server of one's own has its own prices"
    unknown = dataclasses.replace(cloud, systems=(dataclasses.replace(system, model="nobody/knows"),))
    assert Report(list(bare.values()), unknown).costs()["dollars"].null_count() == 3


def test_notes_say_what_a_careful_reader_must_know() -> None:
    rows = [*two_suites(10, 5), ("nq", "lost", None)]
    bare = report(untrained=rows, after_RL=rows)
    whole = manifest(bare)
    suites = (dataclasses.replace(whole.suites[0], total=3610, limit=101, seed=7), whole.suites[1])
    systems = (
        whole.systems[0],
        dataclasses.replace(whole.systems[1], checkpoint="tinker://x", overlap={"nq": 12, "hotpotqa": 0}),
    )
    notes = Report(
        list(bare.values()), dataclasses.replace(whole, suites=suites, systems=systems, notes=("It was hot.",))
    ).notes()
    text = "\n".join(notes)
    assert "untrained: 1 of 151 episodes failed" in text
    assert "after RL was trained on some of these questions (12 of 101 in nq)" in text
    assert "nq 101 of 3,610 (seed 7)" in text
    assert "hotpotqa 50" not in text
    assert "1 sample per question at temperature 0" in text
    assert notes[-1] == "It was hot."
    clean = dataclasses.replace(systems[1], overlap={"nq": 0, "hotpotqa": 0})
    told = Report(list(bare.values()), dataclasses.replace(whole, systems=(systems[0], clean))).notes()
    assert any(
        note.startswith("after RL: no duplicates between these questions and the training questions") for note in told
    )
    unknown = dataclasses.replace(systems[1], overlap=None)
    told = Report(list(bare.values()), dataclasses.replace(whole, systems=(systems[0], unknown))).notes()
    assert any(note.startswith("The training questions of after RL are unknown") for note in told)


def test_a_system_without_a_finished_episode_is_reported_without_flips(tmp_path: Path) -> None:
    found = report(broken=[("nq", "q0", None), ("nq", "q1", None)], whole=rows_of("nq", 1, 2))
    assert list(found.all_flips()) == []
    assert "broken: 2 of 2 episodes failed" in found.save(tmp_path / "report").read_text(encoding="utf-8")
    assert [each[:2] for each in report(a=rows_of("nq", 1, 2), b=rows_of("nq", 2, 2)).all_flips()] == [("a", "b")]


def test_a_report_of_nothing_says_so() -> None:
    empty = Report([])
    assert (len(empty), empty.frame().height, empty.comparisons().height, empty.notes()) == (0, 0, 0, ())
    assert "no systems" in repr(empty)
    assert "no systems" in empty._repr_html_()
    assert "no systems" in empty.markdown()
    lost = report(a=[("nq", "q1", None)])
    assert "–" in repr(lost)
    assert "nan" not in (repr(lost) + lost.markdown() + lost.latex()).lower().replace("nano", "")


def test_it_is_saved_only_where_there_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no folder"):
        report(a=rows_of("nq", 1, 2)).save()
    assert not list(tmp_path.iterdir())
