from __future__ import annotations

import pytest

from searchr1_async.episodes.types import StopReason
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.report_charts import plot_suites
from searchr1_async.runs.evaluation import Evaluation
from tests.watch.builders import episode, question


def evaluation(label: str, corrects: list[float]) -> Evaluation:
    episodes = [
        episode(question(f"q{index}", "nq" if index % 2 else "hotpot"), correct=correct)
        for index, correct in enumerate(corrects)
    ]
    return Evaluation.of(label, tuple(episodes))


def test_suites_of_several_evaluations_side_by_side() -> None:
    before, after = evaluation("before", [0.0, 0.0, 0.0, 1.0]), evaluation("after", [1.0, 0.0, 1.0, 1.0])
    chart = plot_suites(before, after, title="what it bought")
    spec = chart.to_dict()
    rows = next(iter(spec["datasets"].values()))
    shown = {(row["label"], row["suite"]): row["mean"] for row in rows}
    assert shown[("1. before", "hotpot")] == 0.0
    assert shown[("2. after", "hotpot")] == 1.0
    assert shown[("1. before", "nq")] == after.by_data_source["nq"].exact_match == 0.5
    assert "what it bought" in str(spec["title"])


def test_none_is_an_empty_chart_and_one_label_twice_is_refused() -> None:
    assert "No evaluation" in str(plot_suites().to_dict())
    with pytest.raises(ConfigurationError, match="label"):
        plot_suites(evaluation("same", [1.0]), evaluation("same", [0.0]))


def test_other_scores_and_the_averages_over_suites_without_the_episodes() -> None:
    after = evaluation("after", [1.0, 0.0, 1.0, 1.0, 1.0])
    spec = plot_suites(Evaluation("after", after.scores), metric="f1").to_dict()
    shown = {row["suite"]: row for row in next(iter(spec["datasets"].values()))}
    assert list(shown) == ["all suites", "macro average", "hotpot", "nq"]
    assert shown["all suites"]["mean"] == after.f1 == 0.8
    assert shown["macro average"]["mean"] == after.estimate("f1", "macro").mean == 0.75
    assert shown["all suites"]["questions"] == 5
    assert "f1 by suite" in str(spec["title"])
    with pytest.raises(ConfigurationError, match="no metric"):
        plot_suites(after, metric="reward")


def test_a_suite_of_failures_alone_has_no_bar() -> None:
    lost = episode(question("q9", "lost"), stop_reason=StopReason.FAILED, turns=())
    found = Evaluation.of("x", [*evaluation("x", [1.0, 1.0]).episodes, lost])
    rows = next(iter(plot_suites(found).to_dict()["datasets"].values()))
    assert [row["suite"] for row in rows] == ["all suites", "macro average", "hotpot", "nq"]


def test_the_words_below_tell_each_ones_mean_and_no_gain_from_a_baseline_to_another() -> None:
    found = [evaluation("untrained", [0.0, 0.0]), evaluation("after RL", [1.0, 1.0]), evaluation("direct", [0.0, 1.0])]
    said = plot_suites(*found).to_dict()["title"]["subtitle"]
    assert "untrained 0.0%, after RL 100.0%, direct 50.0% over 2 questions" in str(said)
    assert "→" not in str(said)
    many = [evaluation(f"system {number}", [1.0]) for number in range(6)]
    assert "6 evaluations over 1 questions" in str(plot_suites(*many).to_dict()["title"])
