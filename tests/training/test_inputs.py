"""Changed inputs of a resumed run: reported, or refused if evaluations would not be comparable."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import searchr1_async as sr
from searchr1_async.events import Notice
from searchr1_async.training.job import changed_inputs, inputs_of, refuse_other_measure
from tests import tiny_world

QUESTIONS = [sr.Question("a", "What is a?", ("A", "a")), sr.Question("b", "What is b?", ("B",))]
HELD_OUT = [sr.Question("c", "What is c?", ("C",))]


def compiled(source: str) -> Any:
    """The function ``reward`` of source that is in no file, as in a REPL."""
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(source), scope)
    return scope["reward"]


def written(folder: Path, name: str, source: str) -> Any:
    """The function ``reward`` of a module."""
    import importlib.util

    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward


def record(reward: Any = None, questions: Any = QUESTIONS, held_out: Any = HELD_OUT) -> dict[str, Any]:
    """As stored in a resume point."""
    return json.loads(json.dumps(inputs_of(reward or sr.rewards.RecipeReward(), questions, held_out)))


PLAIN = """
    async def reward(episode):
        return 1.0
    """
COMMENTED = '''
    async def reward(episode):
        """With a docstring."""
        # and a comment
        return   1.0
    '''
OTHER = """
    async def reward(episode):
        return 0.5
    """
HELPED = """
    def worth(episode):
        return {worth}

    async def reward(episode):
        return worth(episode)
    """


def test_a_function_is_identified_by_its_and_its_helpers_source(tmp_path: Path) -> None:
    first = record(written(tmp_path, "first", PLAIN))
    assert changed_inputs(first, record(written(tmp_path, "second", COMMENTED))) == []
    assert changed_inputs(first, record(written(tmp_path, "third", OTHER))) == [
        "the source of the reward reward changed"
    ]
    helped = [record(written(tmp_path, f"helped{n}", HELPED.format(worth=n))) for n in (1, 2)]
    assert changed_inputs(*helped) == ["the source of the reward reward changed"]


def test_a_function_without_source_is_identified_by_its_code() -> None:
    first = record(compiled(PLAIN))
    assert changed_inputs(first, record(compiled(PLAIN))) == []
    assert changed_inputs(first, record(compiled(OTHER))) == ["the source of the reward reward changed"]
    # A digest from another Python version is not comparable.
    first["reward"]["by"] = "code of (3, 10)"
    assert changed_inputs(first, record(compiled(OTHER))) == []


def made(weight: float) -> Callable[..., Any]:
    async def reward(episode: sr.Episode, *, bonus: float = 0.0) -> float:
        return weight + bonus

    return reward


@dataclass
class Weighted:
    weight: float
    client: Any = None

    async def __call__(self, episode: sr.Episode) -> float:
        return self.weight

    async def method(self, episode: sr.Episode) -> float:
        return self.weight


def wrapped(reward: Any) -> Any:
    @functools.wraps(reward)
    async def again(episode: sr.Episode) -> float:
        return await reward(episode)

    return again


@pytest.mark.parametrize(
    ("then", "same", "now"),
    [
        (made(0.1), made(0.1), made(0.2)),
        (functools.partial(made(0.1), bonus=1), functools.partial(made(0.1), bonus=1), functools.partial(made(0.1), bonus=2)),
        (Weighted(0.1, object()), Weighted(0.1, object()), Weighted(0.2)),
        (Weighted(0.1).method, Weighted(0.1).method, Weighted(0.2).method),
        (wrapped(made(0.1)), wrapped(made(0.1)), wrapped(made(0.2))),
        (lambda episode: 0.1, lambda episode: 0.1, lambda episode: 0.2),
    ],
    ids=["closure", "partial", "object", "method", "wrapped", "lambda"],
)  # fmt: skip
def test_plain_values_of_a_reward_count_and_objects_do_not(then: Any, same: Any, now: Any) -> None:
    assert changed_inputs(record(then), record(same)) == []
    (told,) = changed_inputs(record(then), record(now))
    assert "the source of the reward" in told


def test_changes_of_recipe_reward_and_questions_are_named() -> None:
    then = record()
    assert changed_inputs(then, record(sr.rewards.RecipeReward(0.5))) == ["format_coefficient is 0.5, was 0.1"]
    assert changed_inputs(then, record(Weighted(1.0))) == ["the reward is Weighted, was RecipeReward"]
    answers = [replace(QUESTIONS[0], golden_answers=("A",)), QUESTIONS[1]]
    assert changed_inputs(then, record(questions=answers)) == ["the golden answers of the training questions changed"]
    texts = [replace(QUESTIONS[0], question="Who is a?"), QUESTIONS[1]]
    assert changed_inputs(then, record(questions=texts)) == ["the texts of the training questions changed"]
    assert changed_inputs({}, record(Weighted(1.0))) == [], "an earlier version kept nothing to compare"


def test_incomparable_changes_are_refused_after_an_evaluation() -> None:
    then = record()
    for now, told in (
        (record(held_out=[replace(HELD_OUT[0], golden_answers=("D",))]), "the golden answers of the held-out questions changed"),
        (record(held_out=[replace(HELD_OUT[0], question="What is d?")]), "the held-out questions changed"),
        (record(sr.rewards.RecipeReward(strict_recipe=True)), r"strict_recipe \(False then, True now\)"),
    ):  # fmt: skip
        with pytest.raises(sr.errors.RunFolderError, match=told):
            refuse_other_measure(then, now)
    for before, now in (
        (then, record(held_out=())),
        ({}, then),
        (record(held_out=()), then),
        (then, record(Weighted(1))),
    ):
        refuse_other_measure(before, now)


async def always(episode: sr.Episode) -> float:
    return float(len(episode.turns))


@pytest.mark.anyio
async def test_a_resume_reports_changes_and_refuses_other_held_out_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    questions, held_out = tiny_world.make_questions()
    questions, held_out = questions[:8], held_out[:2]
    told: list[str] = []

    def emit(event: object) -> None:
        if isinstance(event, Notice) and event.is_warning:
            told.append(event.text)

    async def train(steps: int, **changes: Any) -> None:
        given: dict[str, Any] = {
            "questions": questions,
            "held_out": held_out,
            "resume": True,
            "on_event": emit,
            "epochs": 9,
        }
        settings = tiny_world.served_settings(**{**given, "steps": steps, **changes})
        search = tiny_world.make_search(tmp_path / "index")
        await sr.train(
            settings.pop("questions"), search, out_dir=tmp_path / "run", **tiny_world.given(sr.TrainConfig, settings)
        )

    def changes() -> list[str]:
        found = [text.partition("the previous one: ")[2] for text in told if "different input" in text]
        told.clear()
        return found

    await train(1)
    await train(2, format_coefficient=0.5)
    assert changes() == ["format_coefficient is 0.5, was 0.1"]
    answers = [replace(questions[0], golden_answers=("falux",)), *questions[1:]]
    await train(3, reward=always, questions=answers)
    assert changes() == ["the reward is always, was RecipeReward; the golden answers of the training questions changed"]
    await train(4, reward=always, questions=answers)
    assert changes() == [], "as the session before"

    before = sr.open_run(tmp_path / "run").step
    other = [replace(held_out[0], golden_answers=("nobody",)), *held_out[1:]]
    with pytest.raises(sr.errors.RunFolderError, match="the golden answers of the held-out questions changed"):
        await train(5, reward=always, questions=answers, held_out=other)
    assert sr.open_run(tmp_path / "run").step == before
    # A run of an earlier version has nothing to compare.
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    del state["settings"]["inputs"]
    (tmp_path / "run" / "state.json").write_text(json.dumps(state))
    await train(5)
    assert changes() == []
