"""What the off-policy runs learn: one-hop questions about countries, or the small world of the tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import searchr1_async as sr
from searchr1_async.cli.atlas import HELD_OUT, mixed_questions
from searchr1_async.local import DEFAULT_MODEL


@dataclass(frozen=True)
class World:
    """What is learned, and how all runs play it."""

    model: str
    training: Callable[[int], Sequence[sr.Question]]
    """By seed."""
    held_out: Sequence[sr.Question]
    search: Callable[[], sr.Search]
    playing: dict[str, Any]
    """Settings of ``train`` and ``evaluate`` alike."""
    learning: dict[str, Any]
    """Settings of ``train``."""
    warm_up: sr.WarmUp
    service: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``local_service``."""


def atlas_world(questions: int, groups: int) -> World:
    """SmolLM2-135M on one-hop questions about countries: one search an episode, short turns, small batches.

    A run of 12 steps of 4 groups takes about 3 minutes on 2 cores that do nothing else.
    """
    held_out = [each for each in mixed_questions("held_out", HELD_OUT, seed=0) if each.metadata.get("hop") == 1]
    return World(
        model=DEFAULT_MODEL,
        training=lambda seed: mixed_questions("train", 1200, seed=seed, two_hop_share=0.0),
        held_out=held_out[:questions],
        search=lambda: sr.Search.local("atlas", n_results=1, max_passage_words=30),
        playing={"format": "tags", "max_turns": 2, "max_tokens": 28, "max_trajectory_tokens": 1024},
        learning={
            "group_size": 6,
            "groups_per_batch": groups,
            "minibatches": 2,
            "learning_rate": 1.5e-4,
            "lora_rank": 16,
        },
        warm_up=sr.WarmUp(steps=10),
    )


def tiny_world(questions: int, groups: int, work: Path) -> World:
    """The small world of the tests, to try the benchmark itself in a minute."""
    from tests import tiny_world as tiny

    model = work / "model"  # its checkpoints name it, and the tests' own is another at each start
    if not model.exists():
        shutil.copytree(tiny.model_folder(), model)
    training, held_out = tiny.make_questions()
    playing = {key: value for key, value in tiny.PLAYING.items() if key not in ("local", "progress")}
    return World(
        model=str(model),
        training=lambda seed: training,
        held_out=held_out[:questions],
        search=lambda: tiny.make_search(work / "index"),
        playing=playing,
        learning={
            "group_size": 4,
            "groups_per_batch": groups,
            "minibatches": 2,
            "learning_rate": 1e-3,
            "lora_rank": 32,
        },
        warm_up=tiny.WARM_UP,
        service={"dtype": "float32", "device": "cpu"},
    )
