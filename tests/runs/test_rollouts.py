from __future__ import annotations

import pytest

from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.rewards import RecipeReward
from searchr1_async.episodes.types import Question
from searchr1_async.errors import TooManyFailuresError
from searchr1_async.events import EvaluationFinished, Event, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.player import LocalPlayer
from searchr1_async.runs.rollouts import evaluate_policy, play_all
from searchr1_async.testing import BrokenSearch, DictSearch, ScriptedPolicy

pytestmark = pytest.mark.anyio

QUESTIONS = [Question(f"q{n}", f"What is {n}?", (f"answer {n}",)) for n in range(6)]


class TextDialect:
    """Tokens are characters; a turn is a search (``?query``) or an answer (``!answer``)."""

    name = "text"

    def __init__(self) -> None:
        self.stop: list[int] | list[str] = ["\n"]

    def start(self, question: Question, given: object = None) -> list[int]:
        return [ord(c) for c in question.question]

    def decode(self, tokens: object) -> str:
        return "".join(map(chr, tokens))  # type: ignore[arg-type]

    def read(self, prompt_tokens: object, sampled_tokens: object) -> tuple[str, object]:
        from searchr1_async.episodes.formats import FinalAnswer, SearchRequest

        text = self.decode(sampled_tokens)
        return text, SearchRequest((text[1:],)) if text.startswith("?") else FinalAnswer(text[1:] or None)

    def extend(self, prompt_tokens: object, sampled_tokens: object, queries: object, results: object) -> list[int]:
        return [ord("|")]


def make_engine(search: DictSearch, events: list[Event], **changes: object) -> RolloutEngine:
    settings: dict[str, object] = {
        "dialect": TextDialect(),
        "player": LocalPlayer(
            TextDialect(), search, EpisodeLimits(max_turns=2, max_tokens=20, max_trajectory_tokens=200), SampleGate()
        ),
        "sampling": SamplingSettings(),
        "reward": RecipeReward(),
        "group_size": 8,
        "max_failed_fraction": 0.2,
        "emit": events.append,
    }
    return RolloutEngine(**(settings | changes))  # type: ignore[arg-type]


def reply(prompt: list[int]) -> list[int]:
    """Searches, then answers only even questions correctly."""
    text = "".join(map(chr, prompt))
    number = int(text.split()[2].partition("?")[0])
    if not text.endswith("|"):
        return [ord(c) for c in f"?{number}"]
    return [ord(c) for c in f"!answer {number if number % 2 == 0 else 'unknown'}"]


async def test_an_evaluation_has_every_question_in_order_and_its_score() -> None:
    events: list[Event] = []
    evaluation = await evaluate_policy(
        make_engine(DictSearch(), events), QUESTIONS, ScriptedPolicy(reply), samples=3, label="here", step=7
    )
    assert [episode.question.id for episode in evaluation.episodes] == [q.id for q in QUESTIONS for _ in range(3)]
    assert evaluation.exact_match == 0.5
    assert (evaluation.label, evaluation.step, evaluation.samples_per_question) == ("here", 7, 3)
    started, *advanced, ended, told = events
    assert started == PhaseStarted("evaluate", 6, "questions", "here")
    assert isinstance(ended, PhaseEnded)
    assert [e.done for e in advanced if isinstance(e, PhaseAdvanced)] == [1, 2, 3, 4, 5, 6]
    last = advanced[-1]
    assert isinstance(last, PhaseAdvanced)
    assert last.metrics["correct"] == pytest.approx(0.5)
    assert last.metrics["turns_per_episode"] == 2
    assert last.metrics["valid_calls"] == 1
    assert isinstance(told, EvaluationFinished)
    assert (told.label, told.step) == ("here", 7)
    assert told.metrics["exact_match"] == told.metrics["exact_match/unknown"] == 0.5
    assert told.metrics["exact_match_low"] < 0.5 < told.metrics["exact_match_high"]


async def test_episodes_of_an_evaluation_are_not_told_as_training_episodes() -> None:
    events: list[Event] = []
    await play_all(
        make_engine(DictSearch(), events), QUESTIONS, ScriptedPolicy(reply), samples=2, phase="rollout", label=""
    )
    assert {type(event) for event in events} == {PhaseStarted, PhaseAdvanced, PhaseEnded}


async def test_a_broken_search_is_an_error_and_no_measurement() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await evaluate_policy(
            make_engine(BrokenSearch(), []), QUESTIONS, ScriptedPolicy(reply), samples=1, label="here", step=0
        )
    assert caught.group_contains(TooManyFailuresError, match="the store is gone")


async def test_a_few_failures_are_counted_and_left_out() -> None:
    class HalfBroken(DictSearch):
        async def search(self, queries):  # type: ignore[no-untyped-def]
            return await (BrokenSearch() if queries[0] == "0" else super()).search(queries)

    evaluation = await evaluate_policy(
        make_engine(HalfBroken(), []), QUESTIONS, ScriptedPolicy(reply), samples=1, label="here", step=0
    )
    assert evaluation.failed == 1
    assert evaluation.exact_match == pytest.approx(2 / 5), "over the five questions that were really asked"
