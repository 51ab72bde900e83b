"""Repeating earlier evaluations from their folder, manifest or report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import searchr1_async as sr
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.evaluation.evaluate import evaluate
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.plan import System
from searchr1_async.evaluation.report import Report
from tests import tiny_world
from tests.evaluation.reports import figures

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)


def where() -> dict[str, Any]:
    return {name: value for name, value in tiny_world.served().items() if name != "model"} | {"progress": False}


def asked() -> list[sr.Question]:
    return [replace(question, data_source="world") for question in tiny_world.make_questions()[1][:3]]


async def measured(systems: dict[str, Any], suites: Any = None, **options: Any) -> Report:
    """Without a search, so only the model is needed."""
    settings = {**tiny_world.PLAYING, **tiny_world.served(), "max_trajectory_tokens": 250, **options}
    del settings["local"]
    return await evaluate(
        {"world": asked()} if suites is None else suites, systems=systems, **tiny_world.given(sr.EvalConfig, settings)
    )


def direct(checkpoint: Path | None = None, **options: Any) -> System:
    return System(checkpoint, method="direct", instructions=tiny_world.INSTRUCTIONS, **options)


async def test_a_report_in_memory_is_saved_so_that_its_folder_is_repeated(tmp_path: Path) -> None:
    report = await measured({"direct": direct()}, samples=2)
    assert report.folder is None
    page = report.save(tmp_path / "saved")
    assert report.save(tmp_path / "saved") == page, "its own files are in nobody's way"
    for name in ("report.md", "report.html"):
        assert "manifest.json" in (page.parent / name).read_text(encoding="utf-8")
    again = await evaluate(page.parent, **tiny_world.given(sr.EvalConfig, where()))
    assert figures(again) == figures(report)


async def test_the_folder_of_another_evaluation_is_not_written_over(tmp_path: Path) -> None:
    report = await measured({"direct": direct()}, out_dir=tmp_path / "e")
    manifest, questions = ((tmp_path / "e" / name).read_bytes() for name in ("manifest.json", "questions.parquet"))
    other = await measured({"other": direct()}, suites=asked()[:1])
    with pytest.raises(RunFolderError, match="folder of a run or of another evaluation: save the report elsewhere"):
        other.save(tmp_path / "e")
    assert report.save() == report.save(tmp_path / "e") == tmp_path / "e" / "report.html"
    assert (tmp_path / "e" / "manifest.json").read_bytes() == manifest
    assert (tmp_path / "e" / "questions.parquet").read_bytes() == questions


@pytest.mark.parametrize(
    "given",
    [
        {"samples": 3},
        {"judge": Judge()},
        {"temperature": 0.5},
        {"seed": None},
        {"format": "tags"},
        {"instructions": "search"},
        {"max_turns": 6, "malformed_calls": "tell"},
        {"model": "tiny"},
        {"max_failed_fraction": 0.5},
        {"training_questions": pl.DataFrame({"id": ["1"], "question": ["?"], "golden_answers": [["x"]]})},
        {"systems": {"a": None}, "split": "test", "question_seed": 3},
    ],
    ids=lambda given: ", ".join(given),
)
async def test_what_a_repetition_would_ignore_is_refused_by_name(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("of an evaluation")
    with pytest.raises(ConfigurationError, match=r"repeated with its original settings: omit (.*), or") as caught:
        await evaluate(tmp_path, out_dir=tmp_path / "again", **tiny_world.given(sr.EvalConfig, given))
    named = str(caught.value).partition("omit ")[2].partition(", or")[0]
    assert set(named.split(", ")) == set(given)
    assert not (tmp_path / "again").exists()


async def test_what_is_at_its_default_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("of an evaluation")
    given: dict[str, Any] = {"temperature": 1, "samples": 1, "baselines": [], "training_questions": [], "seed": 0}
    with pytest.raises(RunFolderError, match="not an evaluation manifest"):
        await evaluate(tmp_path, **tiny_world.given(sr.EvalConfig, given))


async def varied(episode: sr.Episode) -> float:
    return sum(episode.tokens) % 7 / 7


@pytest.mark.slow
async def test_the_best_weights_of_a_run_and_what_they_were_trained_on_are_repeated(tmp_path: Path) -> None:
    train, held_out = tiny_world.make_questions()
    run = await sr.train(
        train,
        tiny_world.make_search(tmp_path / "index"),
        out_dir=tmp_path / "run",
        held_out=held_out[:6],
        reward=varied,
        **tiny_world.given(
            sr.TrainConfig,
            tiny_world.served_settings(),
            steps=3,
            held_out_samples=2,
            evaluate_every=1,
            keep_best=True,
            checkpoint_every=10,
            warm_up=tiny_world.WARM_UP,
        ),
    )
    assert run.best is not None
    suites = {"seen": named("seen", train[:2]), "new": named("new", held_out[6:9])}
    more = [*train, replace(held_out[6], id="elsewhere")]
    systems = {"best": direct(run.out_dir, step="best"), "path": direct(None), "base": direct()}
    systems["path"] = System(run.best.sampler_path, method="direct", instructions=tiny_world.INSTRUCTIONS)
    report = await measured(systems, suites, training_questions=more, out_dir=tmp_path / "e")
    assert report.manifest is not None
    best, path, base = report.manifest.systems
    assert (best.checkpoint, best.step) == (run.best.sampler_path, run.best.step)
    assert report["best"].step == run.best.step
    assert report["best"].scores["answer"].to_list() == report["path"].scores["answer"].to_list(), "the same weights"
    assert [each.overlap for each in (best, path, base)] == [{"seen": 2, "new": 1}, {"seen": 2, "new": 1}, None]
    again = await evaluate(tmp_path / "e", **tiny_world.given(sr.EvalConfig, where()))
    assert again.manifest is not None
    assert [asdict(each) for each in again.manifest.systems] == [asdict(each) for each in report.manifest.systems]
    assert figures(again) == figures(report)


def named(suite: str, questions: Sequence[sr.Question]) -> list[sr.Question]:
    return [replace(question, data_source=suite) for question in questions]
