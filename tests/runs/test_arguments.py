"""Arguments of the public functions: coerced, or refused with the argument's name."""

from __future__ import annotations

import argparse
import functools
import inspect
import math
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import searchr1_async as sr
from searchr1_async.cli import main, parser_for
from searchr1_async.config import Config
from searchr1_async.runs.export import export
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world

pytestmark = pytest.mark.anyio

AWAY = "http://127.0.0.1:9"
"""Nobody listens there: an accepted call ends with a ServiceUnavailableError before anything is written."""
NONSENSE = [
    object(),
    math.nan,
    math.inf,
    b"x",
    1j,
    [object()],
    np.zeros(2),
    "half \ud83d",
    "",
    "x",
    -1,
    8.5,
    "1e-4",
    True,
]
TAKES_TEXT = {
    *(
        "model",
        "instructions",
        "renderer",
        "tokenizer",
        "label",
        "split",
        "question",
        "out_dir",
        "service_folder",
        "thinking",
    ),
    *("folder", "base_model", "push_to_hub"),
    *("dtype", "device", "systems", "start_from"),
}
OF_DATA = {"questions", "held_out", "suites", "training_questions"}
"""Checked where questions are read."""

Call = Callable[..., Any]


@functools.cache
def small_questions() -> list[sr.Question]:
    return tiny_world.make_questions()[0][:4]


async def train(**given: Any) -> Any:
    run = sr.train(**given)  # this call refuses
    return await run


@pytest.fixture
def search(tmp_path_factory: pytest.TempPathFactory) -> sr.Search:
    return tiny_world.make_search(tmp_path_factory.mktemp("index"))


@pytest.fixture
def given(search: sr.Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Call], dict[str, Any]]:
    """Arguments of a call that only finds its service unavailable."""
    monkeypatch.chdir(tmp_path)

    def arguments(function: Call) -> dict[str, Any]:
        common: dict[str, Any] = {"service": AWAY}
        own: dict[Call, dict[str, Any]] = {
            sr.train: {"questions": small_questions(), "search": search, "out_dir": "run", "progress": False},
            sr.rollout: {"questions": small_questions(), "search": search, "progress": False},
            sr.evaluate: {"suites": small_questions(), "search": search, "progress": False},
            sr.ask: {"question": "who?", "search": search, "progress": False},
            export: {"run": "tinker://run/weights/1", "folder": "exported"},
            sr.estimate_cost: {"questions": small_questions()},
        }
        return common | own[function]

    return arguments


async def outcome(function: Call, given: dict[str, Any]) -> Exception | None:
    called = train if function is sr.train else function
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found = called(**(tiny_world.given(CONFIGS[function], given) if function in CONFIGS else given))
        if isinstance(found, Awaitable):
            await found
    except Exception as error:
        return error
    return None


def nothing_in(folder: Path) -> bool:
    return not any(folder.iterdir())


CONFIGS: dict[Call, type[Config]] = {
    sr.train: sr.TrainConfig,
    sr.rollout: sr.RolloutConfig,
    sr.evaluate: sr.EvalConfig,
    sr.ask: sr.config.AskConfig,
    sr.estimate_cost: sr.TrainConfig,
}


def defaults_of(function: Call) -> dict[str, Any]:
    """The defaults of a call's arguments and of its settings, by their flat names and by concern."""
    defaults = {each.name: each.default for each in inspect.signature(function).parameters.values()}
    if (kind := CONFIGS.get(function)) is not None:
        defaults |= {each.name: None for each in fields(kind)} | kind().flat()
    return defaults


FUNCTIONS = [sr.train, sr.rollout, sr.evaluate, sr.ask, export, sr.estimate_cost]
EACH = [
    pytest.param(function, name, id=f"{function.__name__}-{name}")
    for function in FUNCTIONS
    for name in defaults_of(function)
    if name not in OF_DATA
]


@pytest.mark.parametrize(("function", "name"), EACH)
async def test_bad_values_are_refused_naming_the_argument(
    function: Call, name: str, given: Callable[[Call], dict[str, Any]], tmp_path: Path
) -> None:
    usual = given(function)
    for value in NONSENSE:
        if name == "service" and isinstance(value, str):
            continue  # an address is checked on connecting
        error = await outcome(function, usual | {name: value})
        if error is None or isinstance(error, sr.errors.ServiceUnavailableError):
            assert isinstance(value, int | float | str | bool), f"{value!r} was taken"
            assert not isinstance(value, str) or name in TAKES_TEXT or value == "x", f"{value!r} was taken"
            assert not isinstance(value, float) or math.isfinite(value), f"{value!r} was taken"
        else:
            assert isinstance(error, sr.errors.ConfigurationError), f"{value!r}: {error!r}"
            told = str(error)
            assert name in told or name.removesuffix("s") in told or repr(value)[1:-1] in told, f"{value!r}: {told}"
    assert nothing_in(tmp_path), "nothing is created"


@pytest.mark.parametrize("function", FUNCTIONS)
async def test_numpy_and_torch_numbers_are_accepted(
    function: Call, given: Callable[[Call], dict[str, Any]], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    usual = given(function)
    numbers = {name: value for name, value in defaults_of(function).items() if type(value) in (int, float, bool)}
    numbers.pop("progress", None)
    assert numbers or function is export
    for make in (np.array, torch.tensor, lambda value: np.array(value)[()]):
        changed = {name: make(value) for name, value in numbers.items()}
        error = await outcome(function, usual | changed)
        assert error is None or isinstance(error, sr.errors.ServiceUnavailableError), error
    assert nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"search": "atlas"},
            r"search is 'atlas' \(str\): pass a Search, such as Search.local\('atlas'\) or await Search.open",
        ),
        ({"search": None}, "search is None: pass a Search"),
        ({"reward": sr.rewards.RecipeReward}, r"give an instance, RecipeReward\(\)"),
        ({"reward": lambda episode, answer: 1.0}, "cannot be called with one argument, the episode"),
        ({"learning_rate": "1e-4"}, r"learning_rate is '1e-4' \(str\): it should be a valid number"),
        ({"group_size": 8.0}, r"group_size is 8.0 \(float\): it should be a valid integer"),
        ({"max_cost": "5"}, "max_cost is '5'"),
        ({"warm_up": True}, "warm_up is True"),
        ({"demonstrations": ["a"]}, r"demonstrations\[0\] is 'a'"),
        ({"trackers": 5}, "trackers is 5"),
        ({"progress": 5}, "progress is 5"),
        ({"resume": 1}, r"resume is 1 \(int\): it should be a valid boolean"),
        ({"episode_time_limit": -1}, "episode_time_limit is -1 .* greater than 0"),
        ({"sampling_deadline": 0}, "sampling_deadline is 0 .* greater than 0"),
    ],
)
async def test_train_refuses_at_the_call(
    changes: dict[str, Any], told: str, given: Callable[[Call], dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=told):
        sr.train(**tiny_world.given(sr.TrainConfig, given(sr.train) | changes))
    assert nothing_in(tmp_path)


async def test_an_unawaited_search_is_reported(given: Callable[[Call], dict[str, Any]]) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match="a Search, such as"):
        sr.train(**tiny_world.given(sr.TrainConfig, given(sr.train) | {"search": sr.Search.open("atlas")}))


async def test_paths_are_resolved_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: sr.Search
) -> None:
    """numpy numbers, a plain reward, a relative folder, and a chdir right after the call."""
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def reward(episode: sr.Episode) -> sr.Score:
        anyio.from_thread.check_cancelled()  # works only in a worker thread
        return sr.Score(np.bool_(len(episode.turns[0].sampled_tokens) % 2), {"short": np.float32(0.5), "right": True})

    settings = tiny_world.served_settings(learning_rate=np.float32(1e-3), group_size=np.int64(4), seed=np.int64(3))
    run = sr.train(
        tiny_world.make_questions()[0],
        search,
        out_dir="runs/first",
        reward=reward,
        **tiny_world.given(sr.TrainConfig, settings, steps=1),
    )
    monkeypatch.chdir(tmp_path / "there")
    result = await run
    assert result.out_dir == tmp_path / "here" / "runs" / "first"
    assert (result.out_dir / "state.json").is_file()
    assert nothing_in(tmp_path / "there")
    assert run.settings["learning"]["group_size"] == 4
    for row in run.episodes().select("reward", "reward_parts").collect().iter_rows(named=True):
        parts = {part["name"]: part["value"] for part in row["reward_parts"]}
        assert (parts["short"], parts["right"]) == (0.5, 1.0)
        assert row["reward"] in (0.0, 1.0)
    # By its absolute path, in each spelling.
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    assert sr.open_run("runs/first").step == sr.open_run("~/runs/first").step == 1
    assert sr.System("runs/first").checkpoint == sr.System(run).checkpoint == result.out_dir
    assert sr.Judge(checkpoint="~/runs/first").checkpoint == result.out_dir
    page = await anyio.to_thread.run_sync(lambda: run.view("~/page.html"))
    assert page == tmp_path / "here" / "page.html"
    assert await anyio.to_thread.run_sync(main, ["view", "~/runs/first", "--out", "~/other.html"]) == 0
    assert (tmp_path / "here" / "other.html").is_file()
    assert not (tmp_path / "here" / "~").exists()


async def test_a_run_started_with_relative_paths_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier version stored a relative model folder and start unchanged."""
    monkeypatch.chdir(tmp_path)
    then = {"model": "models/tiny", "start_from": "runs/zero@best"}
    old = ResumePoint(4, 40, "tinker://run/weights/4", "order", "models/tiny", settings=then)
    now = {**then, "model": str(tmp_path / "models" / "tiny"), "start_from": str(tmp_path / "runs" / "zero@best")}
    old.refuse_changes(now, "order")
    with pytest.raises(sr.errors.RunFolderError, match="model: 'models/tiny' then"):
        old.refuse_changes({**now, "model": str(tmp_path / "other")}, "order")


def parsed(arguments: list[str]) -> argparse.Namespace:
    return parser_for(arguments).parse_args(arguments)


def test_the_command_line_expands_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand ``--out-dir=~/x``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for command in (["eval", "nq", "--out-dir=~/x"], ["atlas", "--out-dir=~/x"]):
        assert parsed(command).out_dir == tmp_path / "x"
    assert parsed(["ask", "~/x", "who?"]).run_folder == tmp_path / "x"
    assert parsed(["export", "run", "~/x"]).folder == tmp_path / "x"


async def test_a_run_or_its_result_is_a_system(search: sr.Search, tmp_path: Path) -> None:
    result = sr.TrainingResult(tmp_path / "run", 1, "finished", None, (), 1.0)
    given: list[Any] = [result, {"trained": result}]
    for systems in given:
        with pytest.raises(sr.errors.RunFolderError, match="run holds no run"):
            await sr.evaluate(small_questions(), search, systems, sr.EvalConfig(model="m"), service=AWAY)


@pytest.mark.parametrize(
    ("function", "most"), [(sr.train, 15), (sr.rollout, 12), (sr.evaluate, 12), (sr.ask, 12), (sr.estimate_cost, 12)]
)
def test_parameter_lists_are_short(function: Call, most: int) -> None:
    assert len(inspect.signature(function).parameters) <= most


async def test_a_run_keeps_its_config_and_a_resume_names_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: sr.Search
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    call = tiny_world.given(sr.TrainConfig, tiny_world.served_settings(), steps=1, lora_rank=None, model=None)
    config: sr.TrainConfig = call.pop("config")

    def start(config: sr.TrainConfig) -> sr.Run:
        folder = tmp_path / "run"
        return sr.train(tiny_world.make_questions()[0], search, folder, config, resume=folder.exists(), **call)

    run = start(config)
    await run
    kept = config.replace(lora_rank=32, epochs=1)
    assert run.config == sr.open_run(tmp_path / "run").config == kept
    assert sr.TrainConfig.load(tmp_path / "run" / "config.toml") == kept
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(sr.errors.RunFolderError, match=r"learning\.learning_rate: 0\.001 then, 0\.002 now"):
        await start(config.replace(learning_rate=2e-3, steps=2))
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    # Length, reporting and faults may change. Folders of earlier versions have no config.
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(sr.errors.ConfigurationError, match="cannot read the settings"):
        _ = run.config
    changed = config.replace(steps=2, checkpoint_every=1, max_failed_fraction=0.5, training_deadline=900)
    assert (await start(changed)).steps == 2
    assert run.config == changed.replace(lora_rank=32, epochs=1)
    assert (await start(run.config)).steps == 2, "a kept config resumes its run"
