"""Evaluation jobs: model precedence, order of services, judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import searchr1_async as sr
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.rewards import RecipeReward
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.judge import Judge, find_judge
from searchr1_async.evaluation.manifest import SystemRecord
from searchr1_async.evaluation.plan import FoundSystem, NewEvaluation, System, describe
from searchr1_async.evaluation.stages import service_stages
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice
from searchr1_async.runs.weights import Weights
from searchr1_async.testing import HashingEmbedder

URL = "http://somewhere:1"


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)


def trained(label: str, model: str | None, folder: str | None = None, **system: Any) -> FoundSystem:
    weights = Weights(f"tinker://{label}", 3, model, None if folder is None else Path(folder))
    return FoundSystem(label, System(method="direct", service_folder=folder, **system), weights)


def base(label: str, **system: Any) -> FoundSystem:
    return FoundSystem(label, System(method="direct", **system))


def records(*systems: FoundSystem, **choice: Any) -> tuple[SystemRecord, ...]:
    play = PlaySettings(RecipeReward(), SamplingSettings())
    return describe(NewEvaluation((), systems, None, play, ServiceChoice(**choice))).systems


def stages(*systems: FoundSystem, **choice: Any) -> list[tuple[str | None, str | None, list[str]]]:
    return [
        (each.choice.model, None if each.folder is None else each.folder.name, [s.label for s in each.systems])
        for each in service_stages(ServiceChoice(**choice), records(*systems, **choice))
    ]


def test_a_model_is_that_of_the_system_of_its_run_of_the_evaluation_of_the_other_runs() -> None:
    systems = (base("named", model="N"), trained("run", "R"), trained("path", None), base("base"))
    assert [each.model for each in records(*systems, model="E")] == ["N", "R", "E", "E"]
    assert [each.model for each in records(*systems)] == ["N", "R", "R", "R"]


def test_an_embedded_service_is_opened_for_each_folder_and_takes_the_base_model_along() -> None:
    systems = (base("base"), trained("one", "A", "f1"), trained("two", "A", "f2"), trained("again", "A", "f1"))
    assert stages(*systems) == [("A", "f1", ["base", "one", "again"]), ("A", "f2", ["two"])]


def test_any_other_service_is_opened_for_each_model_whatever_folders_its_runs_kept() -> None:
    systems = (base("base"), trained("one", "A", "f1"), trained("two", "A", "f2"), trained("other", "B", "f3"))
    assert stages(*systems, service=URL) == [("A", None, ["base", "one", "two"]), ("B", None, ["other"])]


def test_one_judge_judges_all_systems() -> None:
    def judge_of(*models: str, judge: Judge, is_embedded: bool = False) -> str:
        return find_judge(judge, set(models), is_embedded=is_embedded).describe()["model"]

    assert judge_of("A", "A", judge=Judge()) == "A"
    assert judge_of("A", "B", judge=Judge(model="J")) == "J"
    assert judge_of("A", judge=Judge(), is_embedded=True) == "A"
    with pytest.raises(ConfigurationError, match=r"several models \(A, B\).*Judge\(model=…\)"):
        judge_of("A", "B", judge=Judge())
    for models, judge in ((("A", "B"), Judge()), (("A", "B"), Judge(model="A")), (("A",), Judge(model="J"))):
        with pytest.raises(ConfigurationError, match="an embedded service has one model"):
            judge_of(*models, judge=judge, is_embedded=True)


def test_a_search_counts_where_one_searches() -> None:
    play = PlaySettings(RecipeReward(), SamplingSettings())
    search = sr.Search.local([sr.Passage("p", "", "text")], embedder=HashingEmbedder())
    searching = FoundSystem("s", System())
    assert describe(NewEvaluation((), (base("d"),), search, play)).search is None
    assert describe(NewEvaluation((), (base("d"), searching), search, play)).search is not None
    with pytest.raises(ConfigurationError, match="'s' needs a search"):
        NewEvaluation((), (searching,), None, play)
