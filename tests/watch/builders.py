"""Small episodes and groups, and a simulated run's events with their times, for tests and the benchmark."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.events import (
    BatchClosed,
    CheckpointSaved,
    EpisodeFinished,
    EvaluationFinished,
    Event,
    GroupDropped,
    GroupFinished,
    MinibatchLearned,
    MinibatchSubmitted,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    PipelineChanged,
    RolloutSampled,
    RunEnded,
    RunStarted,
    StepFinished,
    WeightsPublished,
)

TICK = 0.25
"""Seconds between two rollout samples."""
HOSTILE = "<script>alert(1)</script>\x00\x1b[31m \u202eevil\u202c \ud83d\ude00 \udcff </pre>&amp;"


def question(name: str = "q0", source: str = "atlas", **metadata: object) -> Question:
    return Question(name, f"What is the capital of {name}?", ("Paris", "City of Light"), source, metadata)


def searching_turn(passage_text: str = "Paris is large.", *, sampled: int = 3, appended: int = 4) -> Turn:
    return Turn(
        sampled_tokens=tuple(range(sampled)),
        logprobs=tuple(-0.5 * (index + 1) for index in range(sampled)),
        text="<tool_call>search</tool_call>",
        content="search",
        policy_version=1,
        call=SearchCall(("capital",), ((Passage("p1", "France", passage_text, 0.75),),), None, 0.25),
        appended_tokens=tuple(range(100, 100 + appended)),
        seconds=1.5,
        sequence_id="request-1:0",
        cached_prompt_tokens=4,
    )


def malformed_turn() -> Turn:
    return Turn((7,), (-1.0,), "<tool_call>{", "", 1, SearchCall((), problem="not JSON"), ())


def answering_turn(text: str = "Answer: Paris", sampled: int = 2) -> Turn:
    return Turn(tuple(range(sampled)), (-0.25,) * sampled, text, text, 2, seconds=0.5)


def episode(
    asked: Question | None = None,
    *,
    correct: float = 1.0,
    turns: Sequence[Turn] | None = None,
    stop_reason: StopReason = StopReason.ANSWER,
    parts: dict[str, float] | None = None,
) -> Episode:
    failed = stop_reason is StopReason.FAILED
    return Episode(
        question=asked or question(),
        prompt_tokens=(1, 2, 3, 4, 5),
        turns=tuple(turns) if turns is not None else (searching_turn(), answering_turn()),
        stop_reason=stop_reason,
        answer="Paris" if correct else None,
        reward=0.0 if failed else correct,
        reward_parts={} if failed else {"correct": correct, "format": 1.0, "f1": correct, **(parts or {})},
        error="SearchError: the store is gone" if failed else None,
        seconds=2.5,
    )


def group(asked: Question | None = None, corrects: Sequence[float] = (1.0, 0.0), failed: int = 0) -> Group:
    asked = asked or question()
    return Group(
        asked,
        tuple(episode(asked, correct=correct) for correct in corrects),
        tuple(episode(asked, stop_reason=StopReason.FAILED, turns=()) for _ in range(failed)),
    )


@dataclass(frozen=True)
class Script:
    """A simulated run; ``seconds_a_step`` sets the pace."""

    steps: int = 60
    groups: int = 32
    group_size: int = 8
    seconds_a_step: float = 20.0
    evaluate_every: int = 20
    model: str = "Qwen/Qwen3-8B"
    seed: int = 0
    has_troubles: bool = True
    """Includes rate limiting, a search outage, a late event loop and failing episodes."""
    first_step: int = 0
    suites: tuple[str, ...] = ("nq", "hotpotqa", "musique")

    def events(self) -> Iterator[tuple[float, Event]]:
        """Each event with its time in seconds."""
        return _Simulation(self).whole_run()


@dataclass
class _Simulation:
    script: Script
    now: float = 0.0
    finished: int = 0
    queries: int = 0
    trained: int = 0
    chance: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.chance.seed(self.script.seed)
        asked = question("France", "nq")
        self.right = episode(asked, turns=(searching_turn(), answering_turn()))
        self.right_late = episode(asked, turns=(searching_turn(), searching_turn(), answering_turn()))
        self.wrong = episode(asked, correct=0.0, turns=(answering_turn(),))
        self.malformed = episode(asked, correct=0.0, turns=(malformed_turn(),), stop_reason=StopReason.MALFORMED_CALL)
        self.failed = episode(asked, stop_reason=StopReason.FAILED, turns=())

    def whole_run(self) -> Iterator[tuple[float, Event]]:
        script = self.script
        yield self.now, Notice("the embedded service answers at http://127.0.0.1:8123 (pid 4711)")
        yield self.now, PhaseStarted("index", 40_000, "passages")
        for done in range(0, 40_001, 8000):
            self.now += 0.5
            yield self.now, PhaseAdvanced("index", done)
        yield self.now, PhaseEnded("index", 3.0)
        yield (
            self.now,
            RunStarted(
                "train",
                script.model,
                False,
                "all-MiniLM-L6-v2",
                "runs/atlas",
                script.first_step,
                script.steps,
                script.group_size,
                script.groups,
                is_tinker=True,
            ),
        )
        if not script.first_step:
            yield from self.evaluation("untrained", 0)
        yield self.now, PhaseStarted("train", script.steps, "steps")
        yield self.now, PhaseAdvanced("train", script.first_step)
        for step in range(script.first_step + 1, script.steps + 1):
            yield from self.step(step)
            if step % script.evaluate_every == 0 and step < script.steps:
                yield from self.evaluation(f"step {step}", step)
        yield self.now, PhaseEnded("train", self.now)
        yield from self.evaluation("after RL", script.steps)
        yield self.now, RunEnded("finished")

    def skill(self, step: int) -> float:
        return 0.18 + 0.42 * (1 - math.exp(-2.5 * step / self.script.steps))

    def step(self, step: int) -> Iterator[tuple[float, Event]]:
        script = self.script
        ticks = max(1, round(script.seconds_a_step / TICK))
        groups_done = 0
        for tick in range(1, ticks + 1):
            until = script.groups * tick // ticks
            while groups_done < until:
                groups_done += 1
                yield from self.group(step, groups_done)
            self.now += TICK
            yield self.now, self.reading(step, groups_done)
            trainer = "learning" if tick * 4 > ticks else "stepping"
            yield (
                self.now,
                PipelineChanged(step, step - 1, script.groups, groups_done, self.chance.randrange(4), trainer),
            )
        yield self.now, BatchClosed(step, script.groups)
        yield self.now, WeightsPublished(step)
        yield self.now, CheckpointSaved(step, f"tinker://run/weights/{step}")
        yield self.now, StepFinished(step, self.metrics(step))

    def group(self, step: int, number: int) -> Iterator[tuple[float, Event]]:
        members = [self.member(step) for _ in range(self.script.group_size)]
        for member in members:
            self.finished += 1
            self.queries += len(member.calls)
            yield self.now, EpisodeFinished(member, step)
        asked: Question = members[0].question
        group = Group(asked, tuple(m for m in members if not m.failed), tuple(m for m in members if m.failed))
        yield self.now, GroupFinished(group, step)
        if group.is_constant:
            yield self.now, GroupDropped(group, step, "constant_reward")
        if number % 8 == 0:
            yield self.now, MinibatchSubmitted(step, 8, 60, 48_000)
            self.trained += 48_000
            yield self.now, MinibatchLearned(step, 60, 48_000)

    def member(self, step: int) -> Episode:
        if self.script.has_troubles and step == 12 and self.chance.random() < 0.2:
            return self.failed
        if self.chance.random() < self.skill(step):
            return self.right_late if self.chance.random() < 0.4 else self.right
        return self.malformed if self.chance.random() < 0.5 * math.exp(-step / 8) else self.wrong

    def reading(self, step: int, groups_done: int) -> RolloutSampled:
        script, chance = self.script, self.chance
        is_troubled = script.has_troubles
        in_flight = script.groups * script.group_size
        searching = chance.randrange(in_flight // 6 + 1)
        queued = chance.randrange(in_flight // 10 + 1)
        return RolloutSampled(
            episodes=in_flight,
            sampling=in_flight - searching - queued - min(3, in_flight - searching - queued),
            queued=queued,
            searching=searching,
            groups=script.groups,
            finished_episodes=self.finished,
            prompt_tokens=self.finished * 1450,
            sampled_tokens=self.finished * 210,
            search={
                "search/queries": float(self.queries),
                "search/calls": float(self.queries),
                "search/failed": 0.0,
                "search/cache_hit_rate": 0.31,
                "search/p50": 0.012,
                "search/p99": 0.094,
                "search/embedding/faults": 0.0,
                "search/store/faults": 2.0 if step > 8 else 0.0,
                "search/store/seconds_down": 7.5 if is_troubled and step == 15 else 0.0,
            },
            limited_by="service" if is_troubled and step == 18 else "work",
            loop_lag_p50=0.12 if is_troubled and step == 21 else 0.0004,
            loop_lag_p99=0.4 if is_troubled and step == 21 else 0.0031,
            loop_lag_max=0.011,
            cpu=0.42 + 0.05 * chance.random(),
        )

    def metrics(self, step: int) -> dict[str, float]:
        noise = self.chance.gauss
        correct = min(1.0, max(0.0, self.skill(step) + noise(0, 0.03)))
        return {
            "env/all/reward/total": correct - 0.1 * math.exp(-step / 8) + noise(0, 0.01),
            "env/all/correct": correct,
            "env/all/turns_per_episode": 1.1 + 1.3 * (1 - math.exp(-step / 10)) + noise(0, 0.04),
            "env/all/valid_calls": min(1.0, 1 - 0.35 * math.exp(-step / 8) + noise(0, 0.01)),
            "env/all/staleness": 0.8,
            "env/all/staleness_max": 2.0,
            "time/total": self.script.seconds_a_step,
        }

    def evaluation(self, label: str, step: int) -> Iterator[tuple[float, Event]]:
        yield self.now, PhaseStarted("evaluate", 500, "questions", label)
        for done in (100, 250, 500):
            self.now += TICK
            yield self.now, PhaseAdvanced("evaluate", done, {"correct": self.skill(step)})
        yield self.now, PhaseEnded("evaluate", 3 * TICK)
        value = self.skill(step)
        metrics = {"exact_match": value, "exact_match_low": value - 0.04, "exact_match_high": value + 0.04}
        suites = {f"exact_match/{name}": value + 0.06 * (1 - place) for place, name in enumerate(self.script.suites)}
        yield self.now, EvaluationFinished(label, step, {**metrics, "questions": 500.0, "episodes": 500.0, **suites})
