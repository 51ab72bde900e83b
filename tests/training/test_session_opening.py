"""The search opens beside the evaluation of the untrained model, which does not search."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.events import (
    EvaluationFinished,
    Event,
    Notice,
    PhaseEnded,
    PhaseStarted,
    RolloutSampled,
    StepFinished,
)
from tests import tiny_world
from tests.late_embedder import LateEmbedder

pytestmark = pytest.mark.anyio


class Events(list[Event]):
    """Collects a run's events; calls ``act`` once so many of a kind have come, those that follow an ``after`` of another kind."""

    def __init__(
        self, act: Callable[[], object], kind: type[Event], count: int = 1, after: type[Event] = Event
    ) -> None:
        super().__init__()
        self._act, self._kind, self._left, self._after = act, kind, count, after
        self._counts = False

    def __call__(self, event: Event) -> None:
        self.append(event)
        self._counts = self._counts or isinstance(event, self._after)
        if self._counts and isinstance(event, self._kind):
            self._left -= 1
            if not self._left:
                self._act()

    def of_phases(self, kind: type[PhaseStarted | PhaseEnded]) -> list[str]:
        return [event.phase for event in self if isinstance(event, kind)]


@pytest.fixture
def embedder() -> LateEmbedder:
    return LateEmbedder()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedder: LateEmbedder) -> Callable[..., sr.Run]:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    search = tiny_world.make_search(tmp_path / "index", embedder=embedder)
    questions, held_out = tiny_world.make_questions()

    def make(events: Events | None = None, **changes: Any) -> sr.Run:
        settings = {"steps": 1, "out_dir": tmp_path / "run", "held_out": held_out[:4], "on_event": events}
        settings |= {"warm_up": sr.WarmUp(steps=2, batch_size=4)} | tiny_world.served_settings(**changes)
        return sr.train(questions, search, **tiny_world.given(sr.TrainConfig, settings))

    return make


async def test_the_untrained_model_is_evaluated_while_the_search_opens(
    start: Callable[..., sr.Run], embedder: LateEmbedder
) -> None:
    events = Events(embedder.may_open.set, EvaluationFinished)
    with anyio.fail_after(120):
        result = await start(events)
    assert (result.steps, result.reason) == (1, "finished")
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any(re.fullmatch(r"untrained: exact match 0\.0% \[0\.0, [\d.]+\] on 4 questions", text) for text in told)
    assert any(
        re.fullmatch(r"after warm-up: exact match .* on 4 questions \(untrained: 0\.0%\)", text) for text in told
    )
    assert events.of_phases(PhaseEnded)[:3] == ["evaluate", "index", "warm-up"]
    assert events.of_phases(PhaseStarted).index("index") < events.of_phases(PhaseStarted).index("warm-up")
    assert tiny_world.tasks_left() == set()


async def test_an_episode_with_a_time_limit_is_played_once_the_search_is_open(
    start: Callable[..., sr.Run], embedder: LateEmbedder
) -> None:
    events = Events(embedder.may_open.set, RolloutSampled, 6)  # the engine has been open for a second
    with anyio.fail_after(120):
        assert (await start(events, episode_time_limit=600.0)).steps == 1
    assert events.of_phases(PhaseStarted)[:2] == ["index", "evaluate"]


async def test_a_search_that_does_not_open_ends_the_run(start: Callable[..., sr.Run], embedder: LateEmbedder) -> None:
    embedder.failure = sr.errors.EmbeddingError("the model cannot be loaded")
    events = Events(embedder.may_open.set, EvaluationFinished)
    with anyio.fail_after(120), pytest.raises(sr.errors.EmbeddingError, match="cannot be loaded"):
        await start(events)
    assert not any(isinstance(event, StepFinished) for event in events)
    assert tiny_world.tasks_left() == set()


async def test_a_run_that_is_stopped_while_its_search_opens_keeps_its_evaluation(
    start: Callable[..., sr.Run], embedder: LateEmbedder
) -> None:
    events = Events(lambda: run.request_stop(), RolloutSampled, 6, after=EvaluationFinished)
    with anyio.fail_after(120):
        run = start(events)
        assert (await run).reason == "stopped"
    assert tiny_world.tasks_left() == set()
    embedder.may_open.set()
    again = Events(lambda: None, Event)
    with anyio.fail_after(120):
        result = await start(again, resume=True)
    assert (result.steps, result.reason) == (1, "finished")
    measured = [event.label for event in (*events, *again) if isinstance(event, EvaluationFinished)]
    assert measured == ["untrained", "after warm-up", "after RL"]
