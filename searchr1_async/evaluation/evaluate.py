"""Playing questions without learning from them: evaluation and plain rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import anyio

from searchr1_async.episodes.types import Group, Question
from searchr1_async.evaluation.result import Evaluation
from searchr1_async.events import PhaseAdvanced, PhaseEnded, PhaseStarted, emit_nothing
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.rollout.player import GroupPolicy


async def play_all(
    engine: RolloutEngine, questions: Sequence[Question], policy: GroupPolicy, *, samples: int, phase: str, label: str
) -> list[Group]:
    """All questions' groups, in the order of the questions, with progress told as a phase."""
    groups: dict[str, Group] = {}
    emit, began = engine.emit, anyio.current_time()
    # An evaluation's episodes are no training episodes: the phase's progress stands for them.
    engine = replace(engine, group_size=samples, emit=emit_nothing)
    emit(PhaseStarted(phase, len(questions), "questions", label))
    send, receive = anyio.create_memory_object_stream[Group](math.inf)
    right = 0.0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.play_groups, questions, policy, send)
        async with receive:
            async for group in receive:
                groups[group.question.id] = group
                right += sum(episode.reward_parts.get("correct", 0.0) for episode in group.episodes) / samples
                emit(PhaseAdvanced(phase, len(groups), {"correct": right / len(groups)}))
    emit(PhaseEnded(phase, anyio.current_time() - began))
    return [groups[question.id] for question in questions]


async def evaluate_policy(
    engine: RolloutEngine, questions: Sequence[Question], policy: GroupPolicy, *, samples: int, label: str, step: int
) -> Evaluation:
    """One evaluation of one policy."""
    groups = await play_all(engine, questions, policy, samples=samples, phase="evaluate", label=label)
    episodes = tuple(episode for group in groups for episode in (*group.episodes, *group.failed))
    return Evaluation(label, episodes, step)
