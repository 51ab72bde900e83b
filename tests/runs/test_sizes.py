"""Default sizes of a run: by the service, and on a resume the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.config import LAPTOP, RECIPE, chosen_sizes
from searchr1_async.events import Event, Notice, PhaseStarted, RunStarted
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world


def chosen(is_embedded: bool = True, questions: int = 1200, **given: Any) -> Any:
    begun = given.pop("begun", None)
    return chosen_sizes(given, questions=questions, is_embedded=is_embedded, begun=begun)


def test_defaults_are_laptop_sizes_when_embedded_else_the_recipes() -> None:
    assert chosen() == LAPTOP
    assert chosen(is_embedded=False) == RECIPE
    assert LAPTOP.steps is not None
    assert LAPTOP.steps * LAPTOP.groups_per_batch * LAPTOP.group_size < 1000, "episodes: 0.5 to 1 s each on two cores"


@pytest.mark.parametrize("said", [{"groups_per_batch": 6}, {"epochs": 1}, {"time_limit": 60.0}])
def test_an_explicit_length_is_not_shortened(said: dict[str, Any]) -> None:
    assert chosen(**said).steps is None
    assert chosen(steps=30).steps == 30


def test_few_questions_are_used_once() -> None:
    assert chosen(questions=20).steps is None
    assert chosen(questions=97).steps == 12


def test_given_sizes_apply_and_minibatches_fit_a_small_batch() -> None:
    sizes = chosen(group_size=4, groups_per_batch=2, max_tokens=28)
    assert (sizes.group_size, sizes.groups_per_batch, sizes.minibatches, sizes.max_tokens) == (4, 2, 2, 28)
    assert chosen(groups_per_batch=2, minibatches=4).minibatches == 4, "what is named is refused, not changed"


def test_a_resume_has_the_run_s_own_sizes() -> None:
    learning = {"group_size": 8, "groups_per_batch": 512, "minibatches": 4}
    limits = {"max_turns": 5, "max_tokens": 1024, "max_trajectory_tokens": 32 * 1024}
    begun = {"learning": learning, "limits": limits}
    assert chosen(begun=begun) == RECIPE, "a run that an earlier version began goes on as it was"
    assert chosen(begun=begun, max_tokens=64).max_tokens == 64
    laptop = {
        "learning": {name: getattr(LAPTOP, name) for name in learning},
        "limits": {name: getattr(LAPTOP, name) for name in limits},
    }
    assert chosen(begun=laptop) == LAPTOP
    assert chosen(begun=laptop, is_embedded=False).groups_per_batch == LAPTOP.groups_per_batch


@pytest.mark.slow
@pytest.mark.anyio
async def test_an_embedded_run_records_its_sizes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    begins = anyio.Event()
    events: list[Event] = []

    def watch(event: Event) -> None:
        events.append(event)
        if isinstance(event, PhaseStarted) and event.phase == "train":
            begins.set()

    def start(**changes: Any) -> sr.Run:
        playing = {name: value for name, value in tiny_world.PLAYING.items() if not name.startswith("max_")}
        facts = tiny_world.make_questions()
        questions = [*facts[0], *facts[1]]
        return sr.train(
            [
                sr.Question(f"{one.id}/{copy}", one.question, one.golden_answers)
                for one in questions
                for copy in range(3)
            ],
            tiny_world.make_search(tmp_path / "index"),
            out_dir=tmp_path / "run",
            **tiny_world.given(sr.TrainConfig, playing | changes, model=str(tiny_world.model_folder())),
        )

    run = start(on_event=watch, max_trajectory_tokens=128)
    with anyio.fail_after(120):
        await begins.wait()
        await run.stop()
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert started.total_steps == LAPTOP.steps
    assert any("12 steps of 8 groups of 8 episodes" in event.text for event in events if isinstance(event, Notice))
    point = ResumePoint.load(tmp_path / "run")
    assert point is not None
    assert point.settings["learning"]["groups_per_batch"] == LAPTOP.groups_per_batch
    assert point.settings["limits"]["max_tokens"] == LAPTOP.max_tokens

    again = start(resume=True)  # without repeating the original limit
    result = await again.stop()
    assert (result.reason, result.steps) == ("stopped", point.step)
