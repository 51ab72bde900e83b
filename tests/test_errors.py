"""An error in a user's function leaves a run with its own traceback, through all task groups."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import searchr1_async as sr
from searchr1_async.errors import ServiceError, ungrouped
from searchr1_async.testing import HashingEmbedder
from tests import tiny_world

pytestmark = pytest.mark.anyio


def as_a_cell_shows(error: BaseException) -> str:
    """The traceback as a notebook prints it."""
    ultratb = pytest.importorskip("IPython.core.ultratb", reason="needs ipykernel")
    printer = ultratb.VerboseTB(include_vars=False, theme_name="nocolor")
    return "\n".join(printer.structured_traceback(type(error), error, error.__traceback__))


def broken_line(*given: object) -> Any:
    return {}["not there"]


async def reward(episode: sr.Episode) -> float:
    return broken_line(episode)


class BrokenEmbedder(HashingEmbedder):
    fingerprint = "broken"

    async def embed_queries(self, texts: Any) -> Any:
        return broken_line(texts)


async def train(folder: Path, **changes: Any) -> object:
    search = changes.pop("search", None) or tiny_world.make_search(folder / "index")
    settings = tiny_world.served_settings(**{"steps": 1, **changes})
    return await sr.train(
        tiny_world.make_questions()[0][:8], search, out_dir=folder / "run", **tiny_world.given(sr.TrainConfig, settings)
    )


async def rollout(folder: Path, **changes: Any) -> object:
    settings = {**tiny_world.PLAYING, **tiny_world.served(), **changes}
    del settings["local"]
    search = settings.pop("search", None) or tiny_world.make_search(folder / "index")
    return await sr.rollout(
        tiny_world.make_questions()[0][:2], search, **tiny_world.given(sr.RolloutConfig, settings, group_size=2)
    )


async def evaluate(folder: Path, **changes: Any) -> object:
    settings = {**tiny_world.PLAYING, **tiny_world.served(), **changes}
    del settings["local"]
    return await sr.evaluate(
        tiny_world.make_questions()[0][:2],
        tiny_world.make_search(folder / "index"),
        **tiny_world.given(sr.EvalConfig, settings),
    )


@pytest.mark.parametrize("work", [train, rollout, evaluate])
async def test_a_failing_reward_line_is_in_the_traceback(
    work: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    with pytest.raises(sr.errors.RewardError, match="not there") as failed:
        await work(tmp_path, reward=reward)
    assert isinstance(failed.value.__cause__, KeyError)
    for shown in ("".join(traceback.format_exception(failed.value)), as_a_cell_shows(failed.value)):
        assert 'return {}["not there"]' in shown
        assert "ExceptionGroup" not in shown


async def test_a_failing_embedder_line_is_in_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    search = sr.Search.local(
        [sr.Passage("p", "", "river barin falux")], path=tmp_path / "broken", embedder=BrokenEmbedder()
    )
    with pytest.raises(sr.errors.SearchError) as failed:
        await train(tmp_path, search=search, warm_up=tiny_world.WARM_UP)
    assert 'return {}["not there"]' in as_a_cell_shows(failed.value)


def test_groups_that_hold_other_errors_stay_groups() -> None:
    mixed = ExceptionGroup("tasks", [ServiceError("away"), ValueError("a fault of ours")])
    with pytest.raises(ExceptionGroup) as raised, ungrouped():
        raise mixed
    assert raised.value is mixed
    with pytest.raises(ServiceError) as found, ungrouped():
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [ServiceError("away")])])
    assert found.value.__context__ is None
