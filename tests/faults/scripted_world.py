"""Questions, a search and a scripted service for runs that are killed or that meet faults: no model, little computation."""

from __future__ import annotations

import random
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import searchr1_async as sr
from searchr1_async.local import LocalService
from searchr1_async.testing import HashingEmbedder, scripted_service
from searchr1_async.training.admission import QuestionOrder
from tests.faults.script import NUMBERS, PLACES, RELATIONS, THINGS

INSTRUCTIONS = "search then answer"
SEED = 2
SETTINGS: dict[str, Any] = {
    "format": "tags",
    "instructions": INSTRUCTIONS,
    "renderer": "chatml",
    "max_tokens": 24,
    "max_turns": 4,
    "max_trajectory_tokens": 512,
    "group_size": 4,
    "groups_per_batch": 6,
    "minibatches": 3,
    "checkpoint_every": 4,
    "seed": SEED,
    # So that a group played again asks as it did before.
    "first_turn": "shared",
    "progress": False,
}


def questions() -> list[sr.Question]:
    """All 60 of them: one epoch."""
    chance = random.Random("facts")
    return [
        sr.Question(f"{relation}-{place}", f"{relation} of {place}?", (chance.choice(THINGS),), "world")
        for relation in RELATIONS
        for place in PLACES
    ]


def order(count: int | None = None) -> QuestionOrder:
    """In which a run of the first ``count`` questions plays them."""
    return QuestionOrder(questions()[:count], seed=SEED)


def passages() -> list[sr.Passage]:
    """One a question, which holds its answer."""
    return [
        sr.Passage(question.id, "", f"{question.id.replace('-', ' ')} {question.golden_answers[0]}")
        for question in questions()
    ]


def make_search(folder: Path, **options: Any) -> sr.Search:
    """A real embedded Chroma, with an embedder that only counts words."""
    settings: dict[str, Any] = {"embedder": HashingEmbedder(), "n_results": 1} | options
    return sr.Search.local(passages(), path=folder, **settings)


async def reward(episode: sr.Episode) -> float:
    """By chance, from the question and the answer alone; one question in six earns the same whatever is answered."""
    asked = episode.question.id.encode()
    if zlib.crc32(asked) % 6 == 0:
        return 0.0
    return float(zlib.crc32(asked + repr(episode.answer).encode()) & 1)


@asynccontextmanager
async def service(
    folder: Path, reply: str = "tests.faults.script:reply", **options: Any
) -> AsyncIterator[LocalService]:
    """The embedded service with a scripted model, in a process of its own: it survives whoever is killed.

    Args:
        folder: of its checkpoints, and of the tokenizer.
        reply: the script.
        options: of :func:`local_service`.
    """
    words = [*INSTRUCTIONS.split(), *RELATIONS, *PLACES, *THINGS, *NUMBERS]
    # Saving takes long enough for groups to finish on weights that are published and not saved yet.
    training = {"per_token": 2e-5, "optim_step": 0.03, "save": 0.2}
    async with scripted_service(folder, reply, words=words, training=training, **options) as running:
        yield running
