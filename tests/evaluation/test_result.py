from __future__ import annotations

import math
from pathlib import Path

import pytest

from searchr1_async.episodes.types import StopReason
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.result import Evaluation, compare
from searchr1_async.evaluation.statistics import wilson_interval
from tests.watch.builders import answering_turn, episode, malformed_turn, question, searching_turn


def evaluation(label: str, corrects: list[float], **changes: object) -> Evaluation:
    episodes = tuple(
        episode(question(f"q{index}", "nq" if index % 2 else "hotpot", hop=1 + index % 2), correct=correct)
        for index, correct in enumerate(corrects)
    )
    return Evaluation.of(label, episodes, **changes)  # type: ignore[arg-type]


def test_figures_of_one_sample_a_question() -> None:
    found = evaluation("untrained", [1.0, 0.0, 0.0, 0.0])
    assert found.questions == 4
    assert found.samples_per_question == 1
    assert found.exact_match == 0.25
    assert found.exact_match_interval == wilson_interval(1, 4)
    assert found.f1 == 0.25
    assert found.turns_per_episode == 2.0
    assert found.valid_call_fraction == 1.0
    assert found.answer_in_passage == 1.0
    assert found.failed == 0
    assert "untrained" in repr(found)
    assert len(repr(found)) < 200


def test_several_samples_count_each_question_once_and_give_a_wider_interval() -> None:
    questions = [question(f"q{index}") for index in range(30)]
    episodes = [episode(asked, correct=float(index < 10)) for index, asked in enumerate(questions) for _ in range(8)]
    found = Evaluation.of("samples", (*episodes, *[episode(questions[0])] * 100))
    assert found.exact_match == pytest.approx(1 / 3)
    low, high = found.exact_match_interval
    one_low, one_high = wilson_interval(80, 240)
    assert high - low > 2 * (one_high - one_low)
    all_right = Evaluation.of("sure", tuple(episode(questions[0]) for _ in range(8)))
    assert all_right.exact_match_interval == wilson_interval(1, 1), "one question is no certainty"


def test_failed_episodes_are_counted_and_otherwise_left_out() -> None:
    good = episode(question("q1"))
    bad = episode(question("q2"), stop_reason=StopReason.FAILED, turns=())
    found = Evaluation.of("x", (good, bad))
    assert (found.failed, found.questions, found.exact_match, found.turns_per_episode) == (1, 2, 1.0, 2.0)
    assert found.stop_fractions["stop/failed"] == 0.5


def test_figures_of_nothing_are_nan() -> None:
    empty = Evaluation.of("empty", ())
    for value in (empty.exact_match, empty.f1, empty.turns_per_episode, empty.valid_call_fraction, empty.point().low):
        assert math.isnan(value)
    assert empty.samples_per_question == 0
    assert empty.to_frame().height == 0
    silent = Evaluation.of("silent", (episode(turns=(answering_turn(),)),))
    assert math.isnan(silent.valid_call_fraction)


def test_calls_that_could_not_be_read_lower_the_valid_fraction() -> None:
    found = Evaluation.of("x", (episode(turns=(searching_turn(), malformed_turn())), episode()))
    assert found.valid_call_fraction == pytest.approx(2 / 3)


def test_parts_by_suite_and_by_hop() -> None:
    found = evaluation("x", [1.0, 0.0, 1.0, 0.0], step=5)
    assert {name: part.exact_match for name, part in found.by_data_source.items()} == {"hotpot": 1.0, "nq": 0.0}
    assert {name: part.exact_match for name, part in found.by_hop.items()} == {"1": 1.0, "2": 0.0}
    assert Evaluation.of("none", (episode(),)).by_hop == {}
    point = found.point()
    assert (point.label, point.step, point.exact_match) == ("x", 5, 0.5)


def test_two_evaluations_are_paired_by_question_whatever_their_order() -> None:
    before = evaluation("before", [0.0] * 10)
    after = evaluation("after", [1.0] * 6 + [0.0] * 4)
    shuffled = Evaluation.of("after", tuple(reversed(after.episodes)))
    found = compare(before, shuffled)
    assert found == compare(before, after)
    assert (found.mean, found.improved, found.worsened) == (pytest.approx(0.6), 6, 0)
    assert found.p_value == pytest.approx(1 / 64), "six heads of six, the mid-p"
    assert compare(before, after, "format").mean == 0.0


def test_a_question_that_failed_on_one_side_is_left_out_of_both() -> None:
    before = evaluation("before", [0.0, 0.0])
    lost = episode(before.episodes[1].question, stop_reason=StopReason.FAILED, turns=())
    after = Evaluation.of("after", (episode(before.episodes[0].question), lost))
    assert compare(before, after).questions == 1
    with pytest.raises(ConfigurationError, match="in common"):
        compare(Evaluation.of("a", (lost,)), Evaluation.of("b", (lost,)))


def test_evaluations_of_other_questions_are_not_compared() -> None:
    with pytest.raises(ConfigurationError, match="1 questions are only in the first and 0 only in the second"):
        compare(evaluation("a", [1.0, 1.0]), evaluation("b", [1.0]))


def test_the_frame_has_one_row_an_episode() -> None:
    frame = evaluation("after RL", [1.0, 0.0], step=3).to_frame()
    assert frame["label"].to_list() == ["after RL"] * 2
    assert frame["step"].to_list() == [3, 3]
    assert frame["correct"].to_list() == [1.0, 0.0]


def test_its_episodes_are_a_page_and_show_themselves_in_a_cell(tmp_path: Path) -> None:
    found = evaluation("untrained <b>", [1.0, 0.0])
    path = found.view(tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Episodes of untrained &lt;b&gt;" in page
    shown = found.view()._repr_html_()  # type: ignore[union-attr]
    assert shown.startswith("<iframe")
    assert "<b>" not in shown
