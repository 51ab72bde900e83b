from __future__ import annotations

import math
from dataclasses import replace

import polars as pl
import pytest

from searchr1_async.episodes.types import StopReason
from searchr1_async.errors import ConfigurationError
from searchr1_async.records.scores import SCORES
from searchr1_async.records.statistics import mean_interval, wilson_interval
from searchr1_async.runs.evaluation import Evaluation, compare, flips
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
    assert str(found) == "exact match 25.0% [4.6, 69.9] on 4 questions"


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
    assert str(found).endswith("on 2 questions, 1 failed")


def test_figures_of_nothing_are_nan() -> None:
    empty = Evaluation.of("empty", ())
    low = empty.exact_match_interval.low
    for value in (empty.exact_match, empty.f1, empty.turns_per_episode, empty.valid_call_fraction, low):
        assert math.isnan(value)
    assert empty.samples_per_question == 0
    silent = Evaluation.of("silent", (episode(turns=(answering_turn(),)),))
    assert math.isnan(silent.valid_call_fraction)


def test_calls_that_could_not_be_read_lower_the_valid_fraction() -> None:
    found = Evaluation.of("x", (episode(turns=(searching_turn(), malformed_turn())), episode()))
    assert found.valid_call_fraction == pytest.approx(2 / 3)


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


# --- several suites ---------------------------------------------------------------------------------------------------


def two_suites(label: str = "x", right: float = 1.0) -> Evaluation:
    """``large``: 1 of 8 right; ``small``: both right; one question of each has two samples."""
    large = [episode(question(f"q{n}", "large"), correct=right if n == 0 else 0.0) for n in range(8)]
    small = [episode(question(f"q{n}", "small"), correct=right) for n in range(2)]
    return Evaluation.of(label, [*large, large[0], *small, small[0]])


def test_the_same_identifier_in_two_suites_is_two_questions() -> None:
    found = two_suites()
    assert (found.questions, found.samples_per_question, found.suites) == (10, 2, ("large", "small"))
    assert found.scores.filter(question_id="q0", suite="large")["sample"].to_list() == [0, 1]


def test_estimates_over_all_questions_of_a_suite_and_over_suites() -> None:
    found = two_suites()
    assert found.estimate("exact_match", "large") == (1 / 8, *mean_interval([1.0] + [0.0] * 7))
    assert found.estimate("exact_match").mean == found.estimate("exact_match", "all").mean == pytest.approx(3 / 10)
    assert found.estimate("exact_match", "macro").mean == pytest.approx((1 / 8 + 1) / 2)
    assert found.estimate("exact_match", "macro")[1:] == pytest.approx(mean_interval([1.0] + [0.0] * 7, [1.0] * 2))
    assert found.estimate("turns").mean == 2.0
    assert found.f1 == found.estimate("cover_match").mean == pytest.approx(0.3)
    for wrong in (("reward", None), ("exact_match", "nq")):
        with pytest.raises(ConfigurationError, match=r"reward|nq"):
            found.estimate(*wrong)


def test_the_summary_has_every_score_of_every_suite_and_over_them() -> None:
    summary = two_suites().summary()
    assert summary["suite"].unique(maintain_order=True).to_list() == ["large", "small", "all", "macro"]
    assert summary.filter(suite="macro")["metric"].to_list() == list(SCORES)
    row = summary.row(by_predicate=(pl.col("suite") == "large") & (pl.col("metric") == "exact_match"), named=True)
    assert (row["mean"], row["questions"], row["episodes"]) == (1 / 8, 8, 9)
    assert summary.filter(suite="all", metric="f1")["episodes"].to_list() == [12]
    assert evaluation("x", [1.0]).summary()["suite"].unique().to_list() == ["hotpot"]
    judged = two_suites()
    scores = judged.scores.with_columns(judged=pl.when(pl.col("suite") == "small").then(1.0))
    rows = Evaluation("x", scores).summary().filter(metric="judged")
    assert rows.select("suite", "mean", "questions", "episodes").fill_nan(None).rows() == [
        ("large", None, 0, 0), ("small", 1.0, 2, 3), ("all", 1.0, 2, 3), ("macro", 1.0, 2, 3)
    ]  # fmt: skip


def test_a_suite_of_failures_alone_is_nan_and_left_out_of_the_macro_average() -> None:
    lost = [episode(question(f"q{n}", "lost"), stop_reason=StopReason.FAILED, turns=()) for n in range(2)]
    found = Evaluation.of("x", [*two_suites().episodes, *lost])
    assert math.isnan(found.estimate("exact_match", "lost").mean)
    assert found.estimate("exact_match", "macro") == two_suites().estimate("exact_match", "macro")
    assert math.isnan(found.summary().filter(suite="lost")["mean"][0])
    assert found.outcomes().filter(suite="lost", outcome="failed")["episodes"].to_list() == [2]
    assert found.metrics()["questions"] == 12.0


def test_one_of_k_samples_and_the_mean_of_k() -> None:
    rights = {"a": [1, 0, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1], "d": [0, 1]}
    episodes = [episode(question(name), correct=float(each)) for name, own in rights.items() for each in own]
    found = Evaluation.of("x", episodes)
    assert found.pass_at(1).mean == pytest.approx((1 / 4 + 0 + 1 + 1 / 2) / 4)
    assert found.pass_at(2).mean == pytest.approx((1 / 2 + 0 + 1 + 1) / 4)
    assert found.pass_at(4).mean == pytest.approx(2 / 3), "d has only two samples"
    assert found.pass_at(4) == (pytest.approx(2 / 3), *mean_interval([1.0, 0.0, 1.0]))
    assert found.avg_at(1).mean == pytest.approx(2 / 4)
    assert found.avg_at(2).mean == pytest.approx((1 / 2 + 0 + 1 + 1 / 2) / 4)
    for k in (0, 5):
        with pytest.raises(ConfigurationError, match="samples=k"):
            found.pass_at(k)


def test_outcomes_tell_the_searchs_failures_from_the_readers() -> None:
    unseen = episode(question("q1"), correct=0.0, turns=(searching_turn("Nothing."), answering_turn()))
    wrong = replace(unseen, answer="Rome")
    misread = replace(episode(question("q2"), correct=0.0), answer="Rome")
    failed = episode(question("q3"), stop_reason=StopReason.FAILED, turns=())
    shares = Evaluation.of("x", [episode(), wrong, misread, unseen, failed]).outcomes()
    assert {outcome: (count, share) for _, outcome, count, share in shares.iter_rows()} == {
        "right_seen": (1, 0.25), "right_unseen": (0, 0.0), "reading_failed": (1, 0.25), "search_failed": (1, 0.25),
        "no_search": (0, 0.0), "no_answer": (1, 0.25), "failed": (1, None),
    }  # fmt: skip
    several = two_suites().outcomes()
    assert several["suite"].unique(maintain_order=True).to_list() == ["large", "small", "all"]


def test_costs_of_an_episode_and_of_a_question_with_all_its_samples() -> None:
    costs = two_suites().costs()
    row = costs.row(by_predicate=pl.col("suite") == "small", named=True)
    assert (row["questions"], row["episodes"], row["seconds"], row["seconds_p95"]) == (2, 3, 3.75, 2.5)
    overall = costs.row(by_predicate=pl.col("suite") == "all", named=True)
    assert overall["turns"] * overall["questions"] == 24.0
    nothing = Evaluation.of("x", [episode(stop_reason=StopReason.FAILED, turns=())])
    assert nothing.costs().height == 0


def test_recall_of_the_gold_passages() -> None:
    known, unknown = question("a", gold_passages=["p1", "p2"]), question("b")
    assert Evaluation.of("x", [episode(known), episode(unknown)]).estimate("gold_recall").mean == 0.5
    assert math.isnan(Evaluation.of("x", [episode(unknown)]).estimate("gold_recall").mean)


def test_scores_without_episodes_have_every_figure_and_say_what_they_lack() -> None:
    whole = two_suites()
    bare = Evaluation("x", whole.scores)
    assert bare.metrics() == whole.metrics()
    assert bare.summary().equals(whole.summary())
    with pytest.raises(ConfigurationError, match="out_dir"):
        _ = bare.episodes


# --- comparison -------------------------------------------------------------------------------------------------------


def test_comparisons_of_one_suite_and_of_the_macro_average() -> None:
    before, after = two_suites("before", 0.0), two_suites("after")
    assert compare(before, after, suite="large").mean == pytest.approx(1 / 8)
    assert compare(before, after, suite="small").questions == 2
    macro = compare(before, after, suite="macro")
    assert (macro.mean, macro.improved, macro.method) == (pytest.approx((1 / 8 + 1) / 2), 3, "sign-flip-exact")
    assert macro.interval.low < macro.mean < macro.interval.high
    assert compare(before, after, "turns").mean == 0.0
    with pytest.raises(ConfigurationError, match="no suite 'nq'"):
        compare(before, after, suite="nq")
    with pytest.raises(ConfigurationError, match="no metric"):
        compare(before, after, "reward")
    larger = Evaluation.of("larger", [*after.episodes, episode(question("new", "small"))])
    assert compare(before, larger, suite="large").mean == pytest.approx(1 / 8), "only the suites compared must agree"


def test_flips_are_listed_with_both_answers_the_greatest_first() -> None:
    asked = {name: question(name) for name in ("gained", "lost", "partly", "same", "failed")}

    def of(label: str, rights: dict[str, list[int]]) -> Evaluation:
        told = [
            replace(episode(asked[name], correct=float(each)), answer="right" if each else f"wrong {n}")
            for name, own in rights.items()
            for n, each in enumerate(own)
        ]
        return Evaluation.of(label, [*told, episode(asked["failed"], stop_reason=StopReason.FAILED, turns=())])

    before = of("before", {"gained": [0, 0], "lost": [1, 1], "partly": [0, 0], "same": [1, 0]})
    after = of("after", {"same": [0, 1], "partly": [0, 1], "lost": [0, 0], "gained": [1, 1]})
    found = flips(before, after)
    assert found.select("question_id", "direction", "before", "after").rows() == [
        ("gained", "improved", 0.0, 1.0), ("lost", "worsened", 1.0, 0.0), ("partly", "improved", 0.0, 0.5)
    ]  # fmt: skip
    assert found.select("before_answer", "after_answer", "before_sample", "after_sample").rows() == [
        ("wrong 0", "right", 0, 0), ("right", "wrong 0", 0, 0), ("wrong 0", "right", 0, 1)
    ]  # fmt: skip
    assert found["golden_answers"][0].to_list() == ["Paris", "City of Light"]
    assert flips(before, before).height == 0
    assert flips(before, before).schema == found.schema
