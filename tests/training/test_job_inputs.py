"""Changed inputs of a resumed run: reported, or refused if evaluations would not be comparable."""

from __future__ import annotations

import json
import textwrap
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


REWARD = """
    async def reward(episode):
        return {worth}
    """


@dataclass
class Weighted:
    weight: float

    async def __call__(self, episode: sr.Episode) -> float:
        return self.weight


def test_a_reward_is_identified_by_its_name_and_its_source(tmp_path: Path) -> None:
    first, same, other = (
        record(written(tmp_path, f"module{number}", REWARD.format(worth=worth)))
        for number, worth in enumerate((1, 1, 2))
    )
    assert changed_inputs(first, same) == []
    (changed,) = changed_inputs(first, other)
    assert changed.startswith("source_text of the reward is ")
    assert changed_inputs(record(Weighted(1.0)), record(Weighted(2.0))) == [], "objects are not compared"
    assert changed_inputs(record(print), record(print)) == [], "it has no source"
    one, other = dict(reward=lambda episode: 1.0, resume=False), dict(reward=lambda episode: 1.0, resume=True)
    assert changed_inputs(record(one["reward"]), record(other["reward"])) == [], "its lines hold more than itself"


def test_changes_of_recipe_reward_and_questions_are_named() -> None:
    then = record()
    assert changed_inputs(then, record(sr.rewards.RecipeReward(0.5))) == [
        "format_coefficient of the reward is 0.5, was 0.1"
    ]
    assert changed_inputs(then, record(Weighted(1.0))) == ["kind of the reward is 'Weighted', was 'RecipeReward'"]
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
        (record(sr.rewards.RecipeReward(strict_recipe=True)), "strict_recipe, which defines a correct answer, changed"),
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
    assert changes() == ["format_coefficient of the reward is 0.5, was 0.1"]
    answers = [replace(questions[0], golden_answers=("falux",)), *questions[1:]]
    await train(3, reward=always, questions=answers)
    assert changes() == [
        "kind of the reward is 'always', was 'RecipeReward'; the golden answers of the training questions changed"
    ]
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
