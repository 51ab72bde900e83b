"""The scripted model of the throughput benchmark, called in the service's process for every continuation.

It reads three things off a prompt's tokens: the question's number behind the first marker, the episode's number behind the
second, and the turn, from how many messages there are. The first continuation of a question takes the first of its
group's courses, the next the second, and so on: so two contenders that ask in different ways play the same episodes.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.shared.scripted_episodes import (
    MEMBER_DIGITS,
    QUESTION_DIGITS,
    WORLD_VARIABLE,
    World,
    number_behind,
    reply_text,
    turn_of,
)
from searchr1_async.testing import TimedReply


@cache
def _world() -> World:
    return World.read(Path(os.environ[WORLD_VARIABLE]))


_members: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)


def reply(prompt: list[int], chance: random.Random) -> TimedReply:
    """The turn that follows, with its time and ``question/episode/turn`` as its label.

    Raises:
        ValueError: the prompt holds no question of this world.
    """
    world = _world()
    first = prompt.index(world.marker)
    subject = number_behind(world, prompt, first, QUESTION_DIGITS)
    turn = turn_of(world, prompt)
    if turn == 0:
        member = next(_members[subject])
    else:
        member = number_behind(world, prompt, prompt.index(world.marker, first + 1), MEMBER_DIGITS)
    plan = world.plan(subject, member)
    if turn >= len(plan.turns):
        raise ValueError(f"question {subject}, episode {member}: asked for turn {turn} of {len(plan.turns)}")
    return TimedReply(reply_text(world, subject, member, turn), plan.turns[turn].seconds, f"{subject}/{member}/{turn}")
