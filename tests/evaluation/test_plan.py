"""Evaluation jobs: model precedence, order of services, judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import searchr1_async as sr
from searchr1_async.config import SamplingSettings
from searchr1_async.data.suites import Suite
from searchr1_async.episodes.reward import RecipeReward
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.plan import EvaluationJob, service_stages
from searchr1_async.evaluation.systems import MeasuredSystem, System
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice
from searchr1_async.runs.weights import Weights
from searchr1_async.testing import HashingEmbedder

URL = "http://somewhere:1"


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)


def trained(label: str, model: str | None, folder: str | None = None, **system: Any) -> MeasuredSystem:
    weights = Weights(f"tinker://{label}", 3, model, None if folder is None else Path(folder))
    return MeasuredSystem(label, System(method="direct", **system), weights)


def base(label: str, **system: Any) -> MeasuredSystem:
    return MeasuredSystem(label, System(method="direct", **system))


def job(*systems: MeasuredSystem, judge: Judge | None = None, **choice: Any) -> EvaluationJob:
    play = PlaySettings(RecipeReward(), SamplingSettings())
    return EvaluationJob((), systems, None, play, ServiceChoice(**choice), judge=judge)


def stages(made: EvaluationJob) -> list[tuple[str | None, str | None, list[str]]]:
    found = service_stages(made, made.systems)
    return [
        (each.choice.model, None if each.folder is None else str(each.folder), [s.label for s in each.systems])
        for each in found
    ]


def test_a_model_is_that_of_the_system_of_its_run_of_the_evaluation_of_the_other_runs() -> None:
    systems = (base("named", model="N"), trained("run", "R"), trained("path", None), base("base"))
    assert [job(*systems, model="E").model_of(each) for each in systems] == ["N", "R", "E", "E"]
    assert [job(*systems).model_of(each) for each in systems] == ["N", "R", "R", "R"]


def test_an_embedded_service_is_opened_for_each_folder_and_takes_the_base_model_along() -> None:
    systems = (base("base"), trained("one", "A", "f1"), trained("two", "A", "f2"), trained("again", "A", "f1"))
    assert stages(job(*systems)) == [("A", "f1", ["base", "one", "again"]), ("A", "f2", ["two"])]


def test_any_other_service_is_opened_for_each_model_whatever_folders_its_runs_kept() -> None:
    systems = (base("base"), trained("one", "A", "f1"), trained("two", "A", "f2"), trained("other", "B", "f3"))
    assert stages(job(*systems, service=URL)) == [("A", None, ["base", "one", "two"]), ("B", None, ["other"])]


def test_one_judge_judges_all_systems() -> None:
    def judge_of(*models: str, judge: Judge, **choice: Any) -> str:
        made = job(*(trained(model, model) for model in models), judge=judge, **choice)
        assert made.found_judge is not None
        return made.found_judge.describe()["model"]

    assert judge_of("A", "A", judge=Judge(), service=URL) == "A"
    assert judge_of("A", "B", judge=Judge(model="J"), service=URL) == "J"
    assert judge_of("A", judge=Judge()) == "A"
    with pytest.raises(ConfigurationError, match=r"several models \(A, B\).*Judge\(model=…\)"):
        judge_of("A", "B", judge=Judge(), service=URL)
    for models, judge in ((("A", "B"), Judge()), (("A", "B"), Judge(model="A")), (("A",), Judge(model="J"))):
        with pytest.raises(ConfigurationError, match="an embedded service has one model"):
            judge_of(*models, judge=judge)


def test_a_search_counts_where_one_searches() -> None:
    play = PlaySettings(RecipeReward(), SamplingSettings())
    search = sr.Search.local([sr.Passage("p", "", "text")], embedder=HashingEmbedder())
    searching = MeasuredSystem("s", System())
    suites: tuple[Suite, ...] = ()
    assert EvaluationJob(suites, (base("d"),), search, play).used_search is None
    assert EvaluationJob(suites, (base("d"), searching), search, play).used_search is search
    with pytest.raises(ConfigurationError, match="'s' needs a search"):
        EvaluationJob(suites, (searching,), None, play)
