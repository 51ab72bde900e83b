"""Whole evaluations of a tiny model over a real service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import polars as pl
import pytest

import searchr1_async as sr
from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.prompts import Method
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.evaluation import evaluate as running
from searchr1_async.evaluation import plan as describing
from searchr1_async.evaluation import stages as playing_
from searchr1_async.evaluation.episode_store import EpisodeStore
from searchr1_async.evaluation.evaluate import evaluate
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.plan import System
from searchr1_async.evaluation.report import Report, open_report
from searchr1_async.events import Event, PhaseAdvanced
from tests import tiny_world
from tests.evaluation.reports import figures

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a warm-up and two steps, each with kept weights."""
    folder = tmp_path_factory.mktemp("trained")

    async def train() -> None:
        await sr.train(
            tiny_world.make_questions()[0],
            tiny_world.make_search(folder / "index"),
            out_dir=folder / "run",
            **tiny_world.given(
                sr.TrainConfig, tiny_world.served_settings(), steps=2, checkpoint_every=1, warm_up=tiny_world.WARM_UP
            ),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
        anyio.run(train)
    return folder / "run"


@pytest.fixture
def search(run: Path) -> sr.Search:
    return tiny_world.make_search(run.parent / "index")


def playing(**changes: Any) -> dict[str, Any]:
    settings = {**tiny_world.PLAYING, **tiny_world.served(), "samples": 2, **changes}
    del settings["local"]
    return settings


def suites() -> dict[str, list[sr.Question]]:
    """Six training questions, and four others; ids are shared between the suites."""
    train, held_out = tiny_world.make_questions()
    return {
        "seen": [replace(question, id=str(n), data_source="seen") for n, question in enumerate(train[:6])],
        "new": [replace(question, id=str(n), data_source="new") for n, question in enumerate(held_out[:4])],
    }


def used(run: Path, method: Method) -> System:
    # Its prompt alone exceeds this world's episode limit.
    return System(run, method=method, instructions=tiny_world.INSTRUCTIONS, limits=EpisodeLimits(2, 12, 250))


def systems(run: Path) -> dict[str, Any]:
    return {"first": System(run, step=1), "last": run, "rag": used(run, "rag")}


async def test_systems_over_suites_in_one_folder(run: Path, search: sr.Search, tmp_path: Path) -> None:
    report = await evaluate(
        suites(),
        search,
        systems=systems(run),
        out_dir=tmp_path / "e",
        **tiny_world.given(sr.EvalConfig, playing(max_trajectory_tokens=250), baselines=["direct"]),
    )
    assert list(report) == ["first", "last", "rag", "direct"]
    assert report.suites == ("seen", "new")
    assert [(each.step, each.questions, each.scores.height) for each in report.values()] == [
        (1, 10, 20), (2, 10, 20), (2, 10, 20), (0, 10, 20),
    ]  # fmt: skip
    assert report["last"].exact_match > 0, "the warm-up taught it to answer"
    assert report["direct"].scores["searches"].sum() == 0
    prompts = [len(episode.prompt_tokens) for episode in report["rag"].episodes]
    assert report["rag"].scores["turns"].unique().to_list() == [1], prompts
    assert report.manifest is not None
    assert [each.overlap for each in report.manifest.systems] == [{"seen": 6, "new": 0}] * 3 + [None]
    assert any("6" in note and "seen" in note for note in report.notes())
    # Ids shared by two suites stay separate.
    asked = {(q.data_source, q.id): q.question for own in suites().values() for q in own}
    for label in report:
        episodes = report[label].episodes
        assert [(e.question.data_source, e.question.id) for e in episodes[::2]] == list(asked)
        assert all(asked[e.question.data_source, e.question.id] == e.question.question for e in episodes)
    assert figures(open_report(tmp_path / "e")) == figures(report)
    assert tiny_world.tasks_left() == set()


async def stop_after(advances: int, *arguments: Any, **options: Any) -> None:
    """An evaluation that is cancelled after this many questions."""
    seen = 0
    with anyio.CancelScope() as scope:

        def emit(event: Event) -> None:
            nonlocal seen
            if isinstance(event, PhaseAdvanced) and event.phase == "evaluate":
                seen += 1
                if seen > advances:
                    scope.cancel()

        await evaluate(*arguments, on_event=emit, **tiny_world.given(sr.EvalConfig, options))
    assert scope.cancelled_caught


def on_disk(folder: Path) -> dict[tuple[Any, ...], Any]:
    """The records of all samples."""
    frame = EpisodeStore(folder).frame().collect()
    rows = [((row["label"], row["group"], row["member"]), str(row)) for row in frame.iter_rows(named=True)]
    assert len(dict(rows)) == len(rows), "a sample was played twice"
    return dict(rows)


async def test_a_resume_keeps_what_was_played_and_comes_to_the_same(
    run: Path, search: sr.Search, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"systems": systems(run), **playing(samples=1, max_episodes_in_flight=4)}
    whole = await evaluate(suites(), search, out_dir=tmp_path / "whole", **tiny_world.given(sr.EvalConfig, options))
    kept: dict[tuple[Any, ...], Any] = {}
    for advances in (3, 9):
        await stop_after(advances, suites(), search, out_dir=tmp_path / "e", resume=bool(kept), **options)
        now = on_disk(tmp_path / "e")
        assert len(now) > len(kept)
        assert kept.items() <= now.items()
        kept = now
    assert len(kept) < 30
    report = await evaluate(
        suites(), search, out_dir=tmp_path / "e", resume=True, **tiny_world.given(sr.EvalConfig, options)
    )
    last = on_disk(tmp_path / "e")
    assert len(last) == 30
    assert kept.items() <= last.items()
    assert figures(report) == figures(whole)


async def test_nothing_is_opened_where_nothing_is_left_and_changes_are_refused_by_name(
    run: Path, search: sr.Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "systems": {"last": run},
        "out_dir": tmp_path / "e",
        **playing(judge=Judge(instructions="river")),
    }
    report = await evaluate(suites(), search, **tiny_world.given(sr.EvalConfig, options))
    (verdicts,) = (tmp_path / "e").glob("judgements-*.parquet")
    judged = verdicts.read_bytes()

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a finished evaluation opens no service and asks no judge")

    for owner, name in (
        (running, "open_stages"), (playing_, "opened_service"), (playing_, "judge_samples"), (playing_, "open_stages"),
        (playing_, "opening_search"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    again = await evaluate(suites(), search, resume=True, **tiny_world.given(sr.EvalConfig, options))
    assert figures(again) == figures(report)
    assert verdicts.read_bytes() == judged
    with pytest.raises(RunFolderError, match="pass resume=True"):
        await evaluate(suites(), search, **tiny_world.given(sr.EvalConfig, options))
    fewer = {name: questions[:2] for name, questions in suites().items()}
    others: list[tuple[str, Any, dict[str, Any]]] = [
        ("settings", suites(), {"samples": 3}),
        ("settings", suites(), {"temperature": 0.5}),
        ("suites, questions_sha256", fewer, {}),
        ("systems", suites(), {"systems": {"other": run}}),
        ("systems", suites(), {"systems": {"last": System(run, step=1)}}),
    ]
    for named, asked, changes in others:
        with pytest.raises(RunFolderError, match=rf"a different evaluation \({named} differ\)"):
            await evaluate(asked, search, resume=True, **tiny_world.given(sr.EvalConfig, options | changes))
    other = tiny_world.make_search(run.parent / "index", n_results=2)
    with pytest.raises(RunFolderError, match=r"\(search differ\)"):
        await evaluate(suites(), other, resume=True, **tiny_world.given(sr.EvalConfig, options))


async def test_an_evaluation_is_repeated_from_all_that_tells_of_it(
    run: Path, search: sr.Search, tmp_path: Path
) -> None:
    files = []
    for name, questions in suites().items():
        rows = [{"id": q.id, "question": q.question, "golden_answers": list(q.golden_answers)} for q in questions]
        files.append(tmp_path / f"{name}.parquet")
        pl.DataFrame(rows).write_parquet(files[-1])
    report = await evaluate(
        files,
        search,
        systems={"last": run},
        out_dir=tmp_path / "e",
        **tiny_world.given(sr.EvalConfig, playing(limit=3)),
    )
    where: dict[str, Any] = {name: value for name, value in tiny_world.served().items() if name != "model"} | {
        "progress": False
    }
    for source in (tmp_path / "e", str(tmp_path / "e" / "manifest.json")):
        again = await evaluate(source, search, **tiny_world.given(sr.EvalConfig, where))
        assert figures(again) == figures(report)
    finished = await evaluate(
        tmp_path / "e", search, out_dir=tmp_path / "e", resume=True, **tiny_world.given(sr.EvalConfig, where)
    )
    assert figures(finished) == figures(report), "its folder alone is enough to go on with it"
    other = tiny_world.make_search(run.parent / "index", n_results=2)
    with pytest.raises(ConfigurationError, match="the search gives other answers"):
        await evaluate(tmp_path / "e", other, **tiny_world.given(sr.EvalConfig, where))
    with pytest.raises(ConfigurationError, match="cannot describe its search"):
        await evaluate(tmp_path / "e", **tiny_world.given(sr.EvalConfig, where))
    with pytest.raises(ConfigurationError, match="repeated with its original settings"):
        await evaluate(tmp_path / "e", search, systems={"last": run}, **tiny_world.given(sr.EvalConfig, where))
    questions = pl.read_parquet(tmp_path / "e" / "questions.parquet")
    questions.with_columns(question=pl.lit("another?")).write_parquet(tmp_path / "e" / "questions.parquet")
    with pytest.raises(RunFolderError, match="beside the manifest do not match it"):
        await evaluate(tmp_path / "e", search, **tiny_world.given(sr.EvalConfig, where))


class FlakySearch(sr.Search):
    """Does not answer while down."""

    down: Callable[[str], bool] = staticmethod(lambda query: False)

    async def search(self, queries: Sequence[str], *arguments: Any, **options: Any) -> Any:
        if any(map(self.down, queries)):
            raise sr.errors.SearchError("the store is busy")
        return await super().search(queries, *arguments, **options)


async def test_what_a_service_failed_is_played_again(run: Path, tmp_path: Path) -> None:
    search = tiny_world.make_search(run.parent / "index", search_class=FlakySearch)
    asked = suites()
    unlucky = asked["new"][1].question
    options: dict[str, Any] = {"systems": {"rag": used(run, "rag")}, **playing()}
    search.down = lambda query: query == unlucky
    report = await evaluate(asked, search, out_dir=tmp_path / "e", **tiny_world.given(sr.EvalConfig, options))
    assert report.only.scores.filter("failed").select("suite", "question_id").unique().rows() == [("new", "1")]
    before = on_disk(tmp_path / "e")
    search.down = lambda query: False
    report = await evaluate(
        asked, search, out_dir=tmp_path / "e", resume=True, **tiny_world.given(sr.EvalConfig, options)
    )
    assert report.only.failed == 0
    after = on_disk(tmp_path / "e")
    assert {key for key in before if before[key] != after[key]} == {("rag", 7, 0), ("rag", 7, 1)}
    whole = await evaluate(asked, search, out_dir=tmp_path / "whole", **tiny_world.given(sr.EvalConfig, options))
    assert figures(report) == figures(whole)


async def test_a_search_is_only_needed_by_those_that_search(run: Path, tmp_path: Path) -> None:
    direct = {"direct": used(run, "direct")}
    report = await evaluate(suites(), systems=direct, **tiny_world.given(sr.EvalConfig, playing()))
    assert isinstance(report, Report)
    assert report.only.scores["searches"].sum() == 0
    with pytest.raises(ConfigurationError, match="'last' needs a search: pass search to evaluate"):
        await evaluate(
            suites(),
            systems=direct | {"last": run},
            out_dir=tmp_path / "e",
            **tiny_world.given(sr.EvalConfig, playing()),
        )
    assert not (tmp_path / "e").exists()


async def test_what_cannot_be_is_refused_before_any_folder_is_made(
    run: Path, search: sr.Search, tmp_path: Path
) -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("a system's label", {"systems": {"": run}}),
        ("step 9", {"systems": {"x": System(run, step=9)}}),
        ("best", {"systems": {"x": System(run, step="best")}}),
        ("holds no run", {"systems": {"x": tmp_path / "nothing"}}),
        ("both called 'direct'", {"systems": {"direct": run}, "baselines": ["direct"]}),
        ("samples is 0", {"samples": 0}),
        ("max_failed_fraction", {"max_failed_fraction": 2.0}),
        ("tool-call format", {"format": "none"}),
        ("tool-call format", {"systems": {"x": System(run, format="none")}}),
    ]
    for named, changes in bad:
        with pytest.raises(ConfigurationError, match=named):
            await evaluate(
                suites(), search, out_dir=tmp_path / "e", **tiny_world.given(sr.EvalConfig, playing() | changes)
            )
    with pytest.raises(ConfigurationError, match="resume=True"):
        await evaluate(suites(), search, resume=True, **tiny_world.given(sr.EvalConfig, playing()))
    assert not (tmp_path / "e").exists()


async def test_the_folder_of_a_training_run_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "questions.parquet").write_bytes(b"of the run")
    search = tiny_world.make_search(tmp_path / "index")
    with pytest.raises(sr.errors.RunFolderError, match="contains a training run"):
        await sr.evaluate(
            tiny_world.make_questions()[1],
            search,
            out_dir=tmp_path,
            **tiny_world.given(sr.EvalConfig, {**tiny_world.PLAYING, "model": str(tiny_world.model_folder())}),
        )
    assert (tmp_path / "questions.parquet").read_bytes() == b"of the run"
    assert not (tmp_path / "manifest.json").exists()


async def test_what_the_service_does_not_have_is_refused_before_any_folder_is_made(
    run: Path, search: sr.Search, tmp_path: Path
) -> None:
    out = tmp_path / "e"
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (sr.SearchR1Error, "does not offer 'no/model'", {"systems": {"x": System(model="no/model")}}),
        (sr.SearchR1Error, "does not offer 'no/model'", {"model": "no/model"}),
        (sr.SearchR1Error, "opening tinker://", {"systems": "tinker://gone/sampler_weights/1"}),
        (ConfigurationError, "renderer 'none'", {"renderer": "none"}),
        (ConfigurationError, "renderer 'none'", {"judge": Judge(renderer="none")}),
        (ConfigurationError, "does not offer", {"judge": Judge(model=str(tmp_path / "no-model"))}),
        (sr.SearchR1Error, "opening tinker://", {"judge": Judge(checkpoint="tinker://gone/sampler_weights/1")}),
        (ConfigurationError, "was trained from", {"systems": {"x": System(run, model="another")}}),
        (ConfigurationError, "has no room for a turn", {"baselines": ["rag"]}),
    ]
    for kind, named, changes in bad:
        with pytest.raises(kind, match=named):
            await evaluate(suites(), search, out_dir=out, **tiny_world.given(sr.EvalConfig, playing() | changes))
        assert not out.exists(), named
    await evaluate(suites(), search, out_dir=out, **tiny_world.given(sr.EvalConfig, playing(samples=1)))


async def test_a_resume_may_have_another_judge_and_plays_nothing_again(
    run: Path, search: sr.Search, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"systems": {"last": run}, "out_dir": tmp_path / "e", **playing(samples=1)}
    first = await evaluate(
        suites(), search, judge=Judge(instructions="river"), **tiny_world.given(sr.EvalConfig, options)
    )
    (verdicts,) = (tmp_path / "e").glob("judgements-*.parquet")
    played, judged = on_disk(tmp_path / "e"), verdicts.read_bytes()
    assert first.manifest is not None
    assert (first.manifest.judge or {})["model"] == playing()["model"], "it is named, though nobody named it"
    none = await evaluate(suites(), search, resume=True, **tiny_world.given(sr.EvalConfig, options))
    assert none.manifest is not None
    assert none.manifest.judge is None
    assert "judged" not in none.metrics
    await evaluate(
        suites(), search, resume=True, judge=Judge(instructions="capital"), **tiny_world.given(sr.EvalConfig, options)
    )
    (other,) = {*(tmp_path / "e").glob("judgements-*.parquet")} - {verdicts}
    assert pl.read_parquet(other).height == 10
    again = await evaluate(
        suites(), search, resume=True, judge=Judge(instructions="river"), **tiny_world.given(sr.EvalConfig, options)
    )
    assert verdicts.read_bytes() == judged
    assert figures(again) == figures(first)
    assert on_disk(tmp_path / "e") == played
    assert open_report(tmp_path / "e").manifest == again.manifest


async def test_numbers_of_numpy_are_numbers_and_texts_are_none(run: Path, search: sr.Search, tmp_path: Path) -> None:
    given = {"samples": np.int64(2), "limit": np.int64(2), "temperature": np.float32(0.5), "seed": np.int32(3)}
    report = await evaluate(
        suites(), search, out_dir=tmp_path / "e", **tiny_world.given(sr.EvalConfig, playing(**given))
    )
    assert report.only.scores.height == 8
    manifest = Manifest.load(tmp_path / "e")
    assert manifest is not None
    assert (manifest.settings["temperature"], manifest.settings["samples"], manifest.settings["seed"]) == (0.5, 2, 3)
    for name, value in (("samples", "2"), ("limit", 2.5), ("temperature", "0.5"), ("max_turns", "3"), ("seed", 1.5)):
        with pytest.raises(ConfigurationError, match=name):
            await evaluate(
                suites(), search, out_dir=tmp_path / "f", **tiny_world.given(sr.EvalConfig, playing(**{name: value}))
            )
    assert not (tmp_path / "f").exists()


async def test_a_search_that_nobody_uses_is_not_asked_for_again(run: Path, search: sr.Search, tmp_path: Path) -> None:
    direct = {"direct": used(run, "direct")}
    report = await evaluate(
        suites(), search, systems=direct, out_dir=tmp_path / "e", **tiny_world.given(sr.EvalConfig, playing(samples=1))
    )
    assert report.manifest is not None
    assert report.manifest.search is None
    where: dict[str, Any] = {key: value for key, value in tiny_world.served().items() if key != "model"}
    again = await evaluate(tmp_path / "e", progress=False, **tiny_world.given(sr.EvalConfig, where))
    assert figures(again) == figures(report)


async def test_a_prompt_that_has_changed_is_another_evaluation(
    run: Path, search: sr.Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = {"direct": used(run, "direct")}
    options: dict[str, Any] = {"systems": direct, "out_dir": tmp_path / "e", **playing(samples=1)}
    report = await evaluate(suites(), search, **tiny_world.given(sr.EvalConfig, options))
    assert report.manifest is not None
    assert report.manifest.systems[0].prompt == tiny_world.INSTRUCTIONS
    monkeypatch.setattr(describing, "EXAMPLES", ())
    with pytest.raises(RunFolderError, match=r"\(systems differ\)"):
        await evaluate(suites(), search, resume=True, **tiny_world.given(sr.EvalConfig, options))
