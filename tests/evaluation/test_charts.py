from __future__ import annotations

import pytest

from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.charts import plot_suites
from searchr1_async.evaluation.result import Evaluation
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
