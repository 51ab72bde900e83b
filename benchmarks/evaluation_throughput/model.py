"""The scripted model of the evaluation benchmark, called in the service's process for every continuation.

It reads the question's number behind the marker in a prompt's tokens, and the turn from how many messages there are. One
episode a question, so nothing else tells which turn of which episode it is.
"""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path

from benchmarks.evaluation_throughput.load import SuiteWorld
from benchmarks.shared.scripted_episodes import QUESTION_DIGITS, WORLD_VARIABLE, number_behind, reply_text, turn_of
from searchr1_async.testing import TimedReply

WARM_UP = "warm-up"
"""The label of the reply to a prompt without a question, which a contender sends before its time is measured."""


@cache
def _world() -> SuiteWorld:
    return SuiteWorld.read(Path(os.environ[WORLD_VARIABLE]))


def reply(prompt: list[int], chance: random.Random) -> TimedReply:
    """The turn that follows, with its time and ``question/0/turn`` as its label.

    Raises:
        ValueError: the prompt holds no whole number of a question, or its episode has ended.
    """
    world = _world()
    if world.marker not in prompt:
        return TimedReply("ready", 0.0, WARM_UP)
    subject = number_behind(world, prompt, prompt.index(world.marker), QUESTION_DIGITS)
    turn = turn_of(world, prompt)
    turns = world.plan(subject).turns
    if turn >= len(turns):
        raise ValueError(f"question {subject}: asked for turn {turn} of {len(turns)}")
    return TimedReply(reply_text(world, subject, 0, turn), turns[turn].seconds, f"{subject}/0/{turn}")
