from __future__ import annotations

import re

from searchr1_async.episodes.types import StopReason
from searchr1_async.evaluation.report_tables import comparison_table, stage_table
from searchr1_async.runs.evaluation import Evaluation
from tests.watch.builders import answering_turn, episode, question


def evaluation(label: str, right: int, of: int = 20) -> Evaluation:
    return Evaluation.of(label, tuple(episode(question(f"q{i}"), correct=float(i < right)) for i in range(of)))


def test_the_table_is_aligned_and_ends_with_the_paired_difference() -> None:
    text = comparison_table([evaluation("untrained", 2), evaluation("warm-up", 4), evaluation("after RL", 14)])
    lines = text.splitlines()
    assert len(lines) == 6
    headings = re.split(r"  +", lines[0])
    assert headings[:-1] == [
        "stage",
        "questions",
        "exact match [95 %]",
        "F1",
        "turns/episode",
        "valid calls",
        "answer seen",
    ]
    assert lines[2].startswith("untrained")
    assert "10.0% [2.8, 30.1]" in lines[2]
    assert len({line.index("2.00") for line in lines[2:5]}) == 1, "columns stand below each other"
    assert lines[5].startswith("warm-up → after RL: +50.0 points [+")
    assert "p 0.00098 (mcnemar-midp); 10 better and 0 worse of 20 questions" in lines[5]


def test_one_evaluation_has_no_difference_and_none_has_no_table() -> None:
    assert len(comparison_table([evaluation("untrained", 2)]).splitlines()) == 3
    assert comparison_table([]) == "no evaluations"


def test_other_questions_are_said_to_be_other_questions() -> None:
    assert (
        comparison_table([evaluation("a", 1, 3), evaluation("b", 1, 4)])
        .splitlines()[-1]
        .endswith("not paired, because the questions differ")
    )


def test_what_was_not_measured_is_a_dash_and_null_not_a_nan() -> None:
    silent = Evaluation.of("silent", (episode(turns=(answering_turn(),)),))
    lost = Evaluation.of("lost", (episode(stop_reason=StopReason.FAILED, turns=()),))
    assert "nan" not in comparison_table([silent, lost])
    table = stage_table([silent, lost])
    columns = [cell.text for cell in table.headings]
    assert table.rows[0][columns.index("valid calls")].text == "–"
    assert table.rows[1][columns.index("exact match [95 %]")].text == "–"
    assert [row[columns.index("failed")].text for row in table.rows] == ["0", "1"]


def test_samples_of_a_question_are_told_apart_from_questions() -> None:
    sampled = Evaluation.of("x", tuple(episode(question(f"q{i}")) for i in range(3) for _ in range(4)))
    assert stage_table([sampled]).rows[0][1].text == "3 × 4"
