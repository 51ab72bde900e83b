"""A service that disappears during a run, behind a real gateway: reported soon, waited for, given up on in time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import searchr1_async as sr
from searchr1_async.events import Event, Notice, ServiceAnswers, ServiceSilent, StepFinished
from searchr1_async.local.process import Latency, TrainingTimes
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.service import availability as reachability
from searchr1_async.service.availability import SILENT_AFTER, Outage, ServiceWatch
from tests import tiny_world
from tests.episodes.stand_in import stand_in
from tests.gateway import Gateway, Mode, gateway
from tests.local.serving import KEY, service_thread

pytestmark = pytest.mark.anyio

MODEL = "Qwen/Qwen3.5-4B"


@dataclass
class World:
    """A scripted service behind a gateway, and the events of a run on it."""

    gateway: Gateway
    folder: Path
    events: list[Event] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    when: Callable[[Event], None] = lambda event: None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.times.append(time.monotonic())
        self.when(event)
        self.changed.set()

    async def until(self, is_so: Callable[[], bool], seconds: float) -> None:
        with anyio.fail_after(seconds):
            while not is_so():
                self.changed.clear()
                await self.changed.wait()

    def told(self, kind: type[Event]) -> list[float]:
        return [at for at, event in zip(self.times, self.events, strict=True) if isinstance(event, kind)]

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice) and event.is_warning]

    def train(self, **changes: Any) -> sr.Run:
        settings: dict[str, Any] = {
            "service": self.gateway.url, "model": MODEL, "tokenizer": str(self.folder / "tokenizer"), "steps": 3,
            "group_size": 4, "groups_per_batch": 2, "minibatches": 1, "drop_constant_groups": False, "max_tokens": 64,
            "progress": False, "on_event": self.emit,
        }  # fmt: skip
        questions = [sr.Question(f"q{i}", f"Who wrote book {i}?", ("Austen",)) for i in range(8)]
        search = tiny_world.make_search(self.folder / "index")
        return sr.train(
            questions, search, out_dir=self.folder / "run", **tiny_world.given(sr.TrainConfig, settings | changes)
        )

    def switch_after(self, step: int, mode: Mode) -> None:
        """Once that step is on disk."""
        self.when = lambda event: (
            self.gateway.switch(mode) if isinstance(event, StepFinished) and event.step == step else None
        )


def reply(prompt: list[int], chance: random.Random) -> str:
    return chance.choice(["Answer: Austen", "Answer: Dickens"])


@pytest.fixture
def times() -> TrainingTimes:
    return TrainingTimes()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: TrainingTimes) -> Iterator[World]:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    stand_in().save_pretrained(tmp_path / "tokenizer")
    backend = ScriptedBackend(
        reply,
        model_name=MODEL,
        tokenizer_path=str(tmp_path / "tokenizer"),
        latency=Latency(floor=0.05),
        training=times,
    )
    with service_thread(tmp_path / "service", backend) as served, gateway(served.url) as opened:
        yield World(opened, tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thirtieth of the times, with which the slow tests measure."""
    for name in ("CHECK_EVERY", "SILENT_AFTER"):
        monkeypatch.setattr(reachability, name, getattr(reachability, name) / 30)
    monkeypatch.setattr(reachability, "CHECK_TIMEOUT", 0.5)


@pytest.mark.usefixtures("quick")
async def test_a_run_waits_out_an_outage(world: World) -> None:
    world.switch_after(1, "fail")
    run = world.train()
    await world.until(lambda: bool(world.told(ServiceSilent)), 20)
    held_at = run.control.now()
    (said,) = [text for text in world.warnings if "has not answered since" in text]
    assert world.gateway.url in said
    assert "500 Internal Server Error" in said
    assert "waits for it until" in said
    assert "max_service_outage=3600 s" in said
    await anyio.sleep(0.3)
    assert run.control.now() == held_at
    world.gateway.switch("pass")
    result = await run
    assert (result.steps, result.reason) == (3, "finished")
    assert len(world.told(ServiceAnswers)) == 1
    assert any("answers again" in event.text for event in world.events if isinstance(event, Notice))


@pytest.mark.usefixtures("quick")
async def test_a_long_outage_ends_the_run_with_its_resume_point(world: World) -> None:
    world.switch_after(1, "fail")
    with pytest.raises(
        sr.errors.ServiceUnavailableError, match=r"has been down for .*restore it and resume.*max_service_outage"
    ):
        await world.train(max_service_outage=1.0)
    assert sr.open_run(world.folder / "run").metrics["step"].max() >= 1
    world.when = lambda event: None
    world.gateway.switch("pass")
    result = await world.train(resume=True)
    assert result.steps == 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mode", ["fail", "silent"])
async def test_a_stop_during_an_outage_does_not_wait(world: World, mode: Mode) -> None:
    world.switch_after(1, mode)
    run = world.train(steps=4)
    await world.until(lambda: bool(world.told(ServiceSilent)), 20)
    with anyio.fail_after(15):
        result = await run.stop()
    assert result.reason == "stopped"
    assert 1 <= result.steps < 4
    world.when = lambda event: None
    world.gateway.switch("pass")
    assert (await world.train(steps=4, resume=True)).steps == 4


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("times", [TrainingTimes(optim_step=1.5)], ids=["1.5 s a step"])
async def test_a_long_training_call_is_not_an_outage(world: World) -> None:
    assert (await world.train(steps=1)).steps == 1
    assert not world.told(ServiceSilent)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("times", [TrainingTimes(optim_step=0.3)], ids=["0.3 s a step"])
async def test_a_service_that_answers_all_but_health_checks_is_not_down(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers to the run itself count, if they come more often than detection takes."""
    monkeypatch.setattr(reachability, "SILENT_AFTER", 2.0)
    world.switch_after(1, "sick")
    assert (await world.train(steps=10)).steps == 10
    first, *_, last = world.told(StepFinished)
    assert last - first > 2.5
    assert not world.told(ServiceSilent)


@pytest.mark.usefixtures("quick")
async def test_a_busy_process_reports_no_outage(world: World) -> None:
    def block(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 1:
            time.sleep(1.2)  # blocks the event loop

    world.when = block
    assert (await world.train()).steps == 3
    assert not world.told(ServiceSilent)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seconds", [0.0, 0.4])
async def test_a_check_that_comes_late_does_not_count(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The process was busy, or the machine asleep: the answer may have come, but nobody read it in time."""
    checks, events = iter(range(9)), list[Event]()

    async def check(url: str, timeout: float, client: object) -> str | None:
        number = next(checks)
        if number in (1, 2, 3):
            time.sleep(seconds)  # noqa: ASYNC251  # blocks the event loop
            return "did not answer"
        return None if number == 0 else await anyio.sleep(60)

    monkeypatch.setattr(reachability, "health_problem", check)
    monkeypatch.setattr(reachability, "CHECK_TIMEOUT", 0.1)
    monkeypatch.setattr(reachability, "LATE", 0.1)
    with anyio.move_on_after(3):
        await ServiceWatch("http://host", 3600, events.append).run()
    assert [isinstance(event, ServiceSilent) for event in events] == ([] if seconds else [False, True])


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "1h"])
async def test_an_invalid_outage_limit_is_refused_at_the_call(world: World, value: Any) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match="max_service_outage"):
        world.train(max_service_outage=value)
    assert not (world.folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fail", "silent"])
async def test_an_outage_is_reported_within_fifteen_seconds(world: World, mode: Mode) -> None:
    world.switch_after(1, mode)
    run = world.train(steps=50)
    await world.until(lambda: bool(world.told(ServiceSilent)), 30)
    assert world.told(ServiceSilent)[0] - world.told(StepFinished)[0] < 15
    world.gateway.switch("pass")
    await world.until(lambda: len(world.told(StepFinished)) >= 6, 60)
    assert (await run.stop()).reason == "stopped"


STEPS = st.lists(st.tuples(st.sampled_from(["answer", "failure", "nothing"]), st.floats(0.1, 4.0)), max_size=40)


@given(STEPS)
def test_outages_follow_from_failed_checks(steps: list[tuple[str, float]]) -> None:
    """In any order of events: an outage means two failed checks and no answer for a while, and one answer ends it."""
    outage, now, answered, failures = Outage(0.0), 0.0, 0.0, 0
    for kind, seconds in steps:
        now += seconds
        was_down = outage.since is not None
        if kind == "answer":
            assert outage.heard(now) == was_down
            answered, failures = now, 0
        elif kind == "failure":
            failures += 1
            begins = outage.failed(now, "is away")
            assert begins == (not was_down and failures >= 2 and now - answered >= SILENT_AFTER)
        assert outage.heard_at == answered
        assert (outage.since is None) or outage.since == answered
