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
from benchmarks.shared.scripted_episodes import QUESTION_DIGITS, reply_text
from searchr1_async.local.scripted_log import TimedReply

WORLD_VARIABLE = "SEARCHR1_EVALUATION_WORLD"
"""The environment variable that names the world's file."""
WARM_UP = "warm-up"
"""The label of what is said to a prompt that holds no question: what a contender sends before its time is taken."""
_MESSAGES_AT_FIRST = 3
"""System, user, and the opened reply."""


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
    first = prompt.index(world.marker)
    behind = prompt[first + 1 : first + 4 + QUESTION_DIGITS]
    digits = [world.digits.index(token) for token in behind if token in world.digits][:QUESTION_DIGITS]
    if len(digits) < QUESTION_DIGITS:
        raise ValueError(f"no number of {QUESTION_DIGITS} digits behind the marker")
    subject = int("".join(map(str, digits)))
    turn = (prompt.count(world.turn_start) - _MESSAGES_AT_FIRST) // 2
    turns = world.plan(subject).turns
    if turn >= len(turns):
        raise ValueError(f"question {subject}: asked for turn {turn} of {len(turns)}")
    return TimedReply(reply_text(world, subject, 0, turn), turns[turn].seconds, f"{subject}/0/{turn}")
