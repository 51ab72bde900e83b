"""Rolls out questions without training on them: evaluations and plain rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import anyio

from searchr1_async.episodes.types import Group, Question
from searchr1_async.evaluation.result import Evaluation
from searchr1_async.events import EvaluationFinished, PhaseAdvanced, PhaseEnded, PhaseStarted, emit_nothing
from searchr1_async.rollout.engine import GroupToPlay, RolloutEngine
from searchr1_async.rollout.player import GroupPolicy


async def play_all(
    engine: RolloutEngine,
    questions: Sequence[Question],
    policy: GroupPolicy,
    *,
    samples: int,
    phase: str,
    label: str,
    yields: bool = False,
    on_question: Callable[[], None] = lambda: None,
) -> list[Group]:
    """Rolls out all questions and returns their groups in question order, with progress as a phase.

    ``yields``: give way to other rollouts on the same engine. ``on_question`` is called when all samples of a question have
    ended. Raises, within an exception group, what :meth:`RolloutEngine.play_groups` raises.
    """
    groups: dict[int, Group] = {}
    means = RunningMeans()
    emit, began = engine.emit, anyio.current_time()
    # Silences training-episode events: the phase reports progress.
    engine = replace(engine, group_size=samples, emit=emit_nothing)
    emit(PhaseStarted(phase, len(questions), "questions", label))
    budget = engine.failure_budget(len(questions))

    def finished(place: int, group: Group) -> None:
        groups[place] = group
        means.add(group, samples)
        on_question()
        emit(PhaseAdvanced(phase, len(groups), means.metrics()))

    await engine.play_groups(
        GroupToPlay(engine.task(place, question, key="0", yields=yields), policy, budget, partial(finished, place))
        for place, question in enumerate(questions)
    )
    emit(PhaseEnded(phase, anyio.current_time() - began))
    return [groups[place] for place in range(len(questions))]


async def evaluate_policy(
    engine: RolloutEngine,
    questions: Sequence[Question],
    policy: GroupPolicy,
    *,
    samples: int,
    label: str,
    step: int,
    yields: bool = False,
    on_question: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluates a policy; arguments and errors as in :func:`play_all`."""
    groups = await play_all(
        engine,
        questions,
        policy,
        samples=samples,
        phase="evaluate",
        label=label,
        yields=yields,
        on_question=on_question,
    )
    episodes = tuple(episode for group in groups for episode in (*group.episodes, *group.failed))
    evaluation = Evaluation.of(label, episodes, step)
    # In a thread: aggregates all scores.
    engine.emit(EvaluationFinished(label, step, await anyio.to_thread.run_sync(evaluation.metrics)))
    return evaluation


@dataclass(slots=True)
class RunningMeans:
    """Running means for progress display; final metrics treat failures exactly."""

    questions: int = 0
    right: float = 0.0
    episodes: int = 0
    rewards: float = 0.0
    turns: int = 0
    calls: int = 0
    valid: int = 0
    failed: int = 0

    def add(self, group: Group, samples: int) -> None:
        self.questions += 1
        self.failed += len(group.failed)
        self.right += sum(episode.reward_parts.get("correct", 0.0) for episode in group.episodes) / samples
        for episode in group.episodes:
            self.episodes += 1
            self.rewards += episode.reward
            self.turns += len(episode.turns)
            self.calls += len(episode.calls)
            self.valid += sum(call.problem is None for call in episode.calls)

    def metrics(self) -> dict[str, float]:
        out = {"correct": self.right / self.questions}
        if self.episodes:
            out |= {"reward/total": self.rewards / self.episodes, "turns_per_episode": self.turns / self.episodes}
        if self.calls:
            out["valid_calls"] = self.valid / self.calls
        if self.failed:
            out["failed_episodes"] = float(self.failed)
        return out
