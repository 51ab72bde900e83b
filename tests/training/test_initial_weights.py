"""Runs that start from weights: another run's, a service's, or an adapter's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.events import Notice, RunStarted
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.runs.weights import find_state
from searchr1_async.training.initial_weights import Start, chosen_model, chosen_rank, find_start, resumed_start
from tests import tiny_world

pytestmark = pytest.mark.anyio


def make_run(folder: Path, *, model: str = "org/model", rank: int = 8, embedded: bool = False) -> Path:
    folder.mkdir(parents=True)
    settings = {"model": model, "learning": {"lora_rank": rank}}
    ResumePoint(4, 40, "tinker://run/weights/step-000004", "order", model, settings=settings).save(folder)
    rows = [
        {
            "step": step,
            "sampler_path": f"tinker://run/sampler_weights/{step}",
            "state_path": f"tinker://run/weights/{step}",
            "exact_match": 1 / step,
            "questions": 4,
        }
        for step in (2, 4)
    ]
    (folder / "checkpoints.json").write_text(json.dumps({"format": 1, "checkpoints": rows}))
    if embedded:
        (folder / "service").mkdir()
    return folder


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)


def path_of(start: Start) -> str | None:
    assert start.state is not None
    return start.state.path


def test_starts_from_the_last_weights_or_a_steps(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "first", embedded=True), tmp_path / "second"
    start = find_start(run, None, out)
    assert (path_of(start), start.rank, start.base_model) == ("tinker://run/weights/4", 8, "org/model")
    assert path_of(find_start(f"{run}@best", None, out)) == "tinker://run/weights/2"
    assert path_of(find_start(f"{run}@2", None, out)) == "tinker://run/weights/2"
    assert path_of(find_start(f"{run}@last", None, out)) == "tinker://run/weights/4"
    with pytest.raises(sr.errors.RunFolderError, match="no weights of step 3; kept: 2, 4"):
        find_start(f"{run}@3", None, out)


def test_the_last_weights_exclude_those_kept_for_an_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", embedded=True)
    kept = json.loads((run / "checkpoints.json").read_text())
    kept["checkpoints"][1]["for_good"] = False
    (run / "checkpoints.json").write_text(json.dumps(kept))
    assert find_state(run).path == "tinker://run/weights/2"
    assert find_state(run, 4).path == "tinker://run/weights/4", "named, it is had as long as it is there"


def test_weights_of_another_service_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "second"
    cloud, embedded = make_run(tmp_path / "cloud"), make_run(tmp_path / "embedded", embedded=True)
    with pytest.raises(sr.errors.RunFolderError, match="pass service=…, or set"):
        find_start(cloud, None, out)
    with pytest.raises(sr.errors.ConfigurationError, match="neither a run's folder nor a PEFT adapter's"):
        find_start(tmp_path / "nothing", None, out)
    with pytest.raises(sr.errors.ConfigurationError, match="pass resume=True"):
        find_start(embedded, None, embedded)
    with pytest.raises(sr.errors.ConfigurationError, match="no training state"):
        find_start("tinker://run/sampler_weights/4", None, out)
    monkeypatch.setenv("TINKER_API_KEY", "tml-key")
    assert path_of(find_start(cloud, None, out)) == "tinker://run/weights/4"
    with pytest.raises(sr.errors.RunFolderError, match="pass service=…, or unset"):
        find_start(embedded, None, out)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "org/model"}')
    with pytest.raises(sr.errors.ConfigurationError, match="only the embedded service accepts"):
        find_start(adapter, None, out)
    assert find_start(adapter, "http://localhost:1", out).rank == 8


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"r": null}', '{"r": 0}', '{"r": 1e400}', '{"r": 8, "base_model_name_or_path": 3}']
)
def test_an_invalid_adapter_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(
        sr.errors.ConfigurationError, match=r"adapter_config\.json is not a LoRA adapter's configuration"
    ):
        find_start(tmp_path, None, tmp_path / "second")


def test_a_file_and_a_wrongly_typed_step_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(sr.errors.ConfigurationError, match="neither a run's folder nor a PEFT adapter's"):
        find_start(tmp_path / "file", None, tmp_path / "second")
    with pytest.raises(sr.errors.RunFolderError, match="holds no run: pass a run's folder"):
        find_state(tmp_path / "file")
    step: Any = "2"
    with pytest.raises(sr.errors.RunFolderError, match="no weights of step '2'; kept: 2, 4"):
        find_state(make_run(tmp_path / "first"), step)


def test_contradictions_are_refused_by_name(tmp_path: Path) -> None:
    start = find_start(make_run(tmp_path / "first", embedded=True), None, tmp_path / "second")
    assert (chosen_rank(None, start), chosen_rank(8, start), chosen_rank(None, None), chosen_rank(4, None)) == (
        8,
        8,
        32,
        4,
    )
    with pytest.raises(sr.errors.ConfigurationError, match=r"lora_rank is 16, .*have rank 8"):
        chosen_rank(16, start)
    assert (chosen_model(None, start), chosen_model("org/model", start)) == ("org/model", "org/model")
    assert chosen_model("org/model:peft:262144", start) == "org/model:peft:262144"
    assert (chosen_model(None, None), chosen_model("org/other", None)) == (None, "org/other")
    with pytest.raises(sr.errors.ConfigurationError, match=r"model is 'org/other', .*'org/model'"):
        chosen_model("org/other", start)


def test_a_resume_does_not_need_the_original_weights(tmp_path: Path) -> None:
    point = ResumePoint.load(make_run(tmp_path / "second"))
    assert point is not None
    start = resumed_start("runs/first", point)
    assert (start.name, chosen_rank(None, start), chosen_model(None, start)) == ("runs/first", 8, "org/model")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sr.Run]:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    monkeypatch.setenv("TINKER_BASE_URL", tiny_world.shared_service().url)

    def make(name: str, **changes: Any) -> sr.Run:
        settings = tiny_world.served_settings(steps=1, learning_rate=1e-5, lora_rank=None) | changes
        questions, held_out = tiny_world.make_questions()
        search = tiny_world.make_search(tmp_path / "index")
        given: dict[str, Any] = {"held_out": held_out} | tiny_world.given(sr.TrainConfig, settings)
        return sr.train(questions, search, out_dir=tmp_path / name, **given)

    return make


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory: pytest.TempPathFactory) -> sr.runs.RecordedRun:
    """A finished run of one step after a warm-up, on the shared service."""
    folder = tmp_path_factory.mktemp("warmed-up")

    async def train() -> None:
        settings = tiny_world.served_settings(steps=1, learning_rate=1e-5, lora_rank=None)
        questions, held_out = tiny_world.make_questions()
        search = tiny_world.make_search(folder / "index")
        settings |= {"held_out": held_out, "warm_up": tiny_world.WARM_UP}
        await sr.train(questions, search, out_dir=folder / "first", **tiny_world.given(sr.TrainConfig, settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
        anyio.run(train)
    return sr.open_run(folder / "first")


async def test_a_run_starts_where_another_ended(
    train: Callable[..., sr.Run], warmed_up: sr.runs.RecordedRun, tmp_path: Path
) -> None:
    shutil.copytree(warmed_up.out_dir, tmp_path / "first")
    first = warmed_up.result
    events: list[Any] = []
    settings = {"start_from": tmp_path / "first", "on_event": events.append}
    second = train("second", **settings)
    result = await second
    before, after = first.evaluations[-1], result.evaluations[0]
    assert (after.label, after.step) == ("at the start", 0)
    assert after.exact_match == pytest.approx(before.exact_match, abs=0.35), "not the untrained model's"
    assert before.exact_match > 0.1
    point = ResumePoint.load(second.out_dir)
    assert point is not None
    assert point.started_from is not None
    assert (point.started_from["step"], point.started_from["name"]) == (1, str(tmp_path / "first"))
    assert point.started_from["path"].endswith("/weights/step-000001")
    assert second.settings["start_from"] == str(tmp_path / "first")
    (began,) = [event for event in events if isinstance(event, RunStarted)]
    assert began.settings["start_from"] == str(tmp_path / "first")
    assert any(isinstance(event, Notice) and "starting from" in event.text for event in events)
    (tmp_path / "first").rename(tmp_path / "moved")
    again = await train("second", resume=True, **settings | {"steps": 2})
    assert again.steps == 2
    with pytest.raises(sr.errors.RunFolderError, match="start_from"):
        await train("second", resume=True, steps=3)


async def test_a_failed_start_from_weights_does_not_block_the_next(
    train: Callable[..., sr.Run], warmed_up: sr.runs.RecordedRun
) -> None:
    def broken(episode: sr.Episode) -> float:
        raise KeyError("missing")

    settings: dict[str, Any] = {"start_from": warmed_up.checkpoints[-1].state_path, "held_out": (), "resume": True}
    with pytest.raises(sr.errors.RewardError, match="missing"):
        await train("second", reward=broken, **settings)
    assert (await train("second", **settings | {"learning_rate": 2e-5})).steps == 1


async def test_a_run_starts_from_an_adapter_and_from_a_path(
    train: Callable[..., sr.Run], warmed_up: sr.runs.RecordedRun, tmp_path: Path
) -> None:
    adapter = await warmed_up.export(tmp_path / "adapter")
    state = warmed_up.checkpoints[-1].state_path
    scores = {}
    for name, start_from in {"adapter": adapter, "path": state}.items():
        result = await train(f"from-{name}", start_from=start_from)
        scores[name] = result.evaluations[0].exact_match
    assert scores["adapter"] == scores["path"]
    with pytest.raises(sr.errors.ConfigurationError, match="pass lora_rank=32"):
        await train("other", start_from=state, lora_rank=16)
    with pytest.raises(sr.errors.ConfigurationError, match="have rank 32: pass lora_rank=32"):
        train("other", start_from=adapter, lora_rank=16)


@pytest.mark.slow
async def test_an_embedded_run_starts_from_another_embedded_runs_folder(tmp_path: Path) -> None:
    """Each has its own service: the weights are copied from one's checkpoints to the other's."""
    questions = tiny_world.make_questions()[0]
    settings: dict[str, Any] = tiny_world.SETTINGS | {
        "group_size": 4,
        "groups_per_batch": 6,
        "minibatches": 2,
        "steps": 1,
    }
    settings |= {"model": str(tiny_world.model_folder()), "lora_rank": 4}
    search = tiny_world.make_search(tmp_path / "index")
    first = sr.train(
        questions,
        search,
        out_dir=tmp_path / "first",
        **tiny_world.given(sr.TrainConfig, settings, warm_up=tiny_world.WARM_UP),
    )
    await first
    settings |= {"lora_rank": None, "start_from": f"{tmp_path / 'first'}@1"}
    search = tiny_world.make_search(tmp_path / "index")
    second = sr.train(questions, search, out_dir=tmp_path / "second", **tiny_world.given(sr.TrainConfig, settings))
    assert (await second).steps == 1
    assert second.settings["learning"]["lora_rank"] == 4
    point = ResumePoint.load(tmp_path / "second")
    assert point is not None
    assert point.started_from is not None
    assert point.started_from["path"] == first.checkpoints[-1].state_path
