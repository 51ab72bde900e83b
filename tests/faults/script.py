"""What the scripted model of the tests of faults says: searches and answers by chance, in times with a long tail.

Its chance comes from the request's seed alone, not from the weights: a group played again by the same seed says the same. It
runs in the service's process, which should come up quickly: nothing else is imported here.
"""

from __future__ import annotations

import random

from searchr1_async.testing import TimedReply

RELATIONS = ("capital", "river", "mountain")
PLACES = tuple(first + second for first in ("ba", "ko", "mi", "tu", "re") for second in ("rin", "dor", "sel", "tam"))
THINGS = tuple(first + second for first in ("fa", "ge", "lo") for second in ("lux", "mek"))
NUMBERS = tuple(f"n{number}" for number in range(100))
"""Make one question's searches differ, so that they are not all answered from a cache."""
SEARCHES = 0.55
"""Of the turns."""
MEDIAN_SECONDS, SPREAD, MAX_SECONDS = 0.1, 0.8, 1.5
"""Of one turn: lognormal, with the standard deviation of its logarithm."""


def reply(prompt: list[int], chance: random.Random) -> TimedReply:
    """A search or an answer."""
    return _turn(chance, "", 1.0)


def slow_reply(prompt: list[int], chance: random.Random) -> TimedReply:
    """Ten times as slow, with searches that hardly ever repeat: for long runs with many episodes at once."""
    return _turn(chance, f" {chance.choice(NUMBERS)} {chance.choice(NUMBERS)}", 10.0)


def _turn(chance: random.Random, suffix: str, slowness: float) -> TimedReply:
    if chance.random() < SEARCHES:
        text = f"<search>{chance.choice(RELATIONS)} {chance.choice(PLACES)}{suffix}</search>"
    else:
        text = f"<answer>{chance.choice(THINGS)}</answer>"
    return TimedReply(text, slowness * min(MAX_SECONDS, MEDIAN_SECONDS * chance.lognormvariate(0, SPREAD)))
