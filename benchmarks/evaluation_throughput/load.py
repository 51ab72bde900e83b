"""What the evaluation benchmark plays: seven suites whose episodes are as long as suites of their kind ask for.

As in benchmarks/shared/scripted_episodes.py the course of an episode depends on nothing but its question, so every contender plays the
same episodes. What differs is the suite: one search answers most questions of popqa, while those of musique take three or four.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks.shared.scripted_episodes import (
    DECODE,
    JITTER,
    PREFILL,
    TOKENS_MOST,
    TOKENS_SPREAD,
    EpisodePlan,
    Subject,
    TurnPlan,
    World,
)

MOST_QUESTIONS = 500
"""Of a suite: its subjects in the world, so that one index serves every smaller size too."""
_CALL_TOKENS = 30
"""About what a call takes beside its query."""
_ANSWER_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Profile:
    """How the episodes of a suite go. A model of what such questions ask for, not measured on the suites themselves."""

    turns: tuple[float, ...]
    """Weights of 1, 2, … turns; the last one answers."""
    tokens: float
    """Median of a turn."""


PROFILES = {
    "nq": Profile((0.15, 0.60, 0.20, 0.05), 55),
    "triviaqa": Profile((0.30, 0.55, 0.15), 50),
    "popqa": Profile((0.10, 0.70, 0.20), 45),
    "hotpotqa": Profile((0.05, 0.30, 0.45, 0.15, 0.05), 65),
    "2wikimultihopqa": Profile((0.0, 0.25, 0.40, 0.25, 0.10), 65),
    "musique": Profile((0.0, 0.15, 0.30, 0.30, 0.25), 75),
    "bamboogle": Profile((0.05, 0.70, 0.25), 45),
}
"""By suite, in the order in which they are evaluated where they are evaluated one after the other."""
SUITES = tuple(PROFILES)


@dataclass(frozen=True)
class SuiteWorld(World):
    """A world whose subjects are the suites' questions: suite ``n`` has the numbers from ``n * MOST_QUESTIONS`` on."""

    @staticmethod
    def of(world: World) -> SuiteWorld:
        """The same subjects, played as their suites are.

        Raises:
            ValueError: it has other than ``MOST_QUESTIONS`` for each suite.
        """
        if len(world.subjects) != len(SUITES) * MOST_QUESTIONS:
            raise ValueError(f"{len(world.subjects)} subjects: {len(SUITES)} suites have {MOST_QUESTIONS} each")
        return SuiteWorld(**{field.name: getattr(world, field.name) for field in dataclasses.fields(World)})

    @staticmethod
    def read(path: Path) -> SuiteWorld:
        """What ``save`` wrote."""
        return SuiteWorld.of(World.read(path))

    def plan(self, subject: int, member: int = 0) -> EpisodePlan:
        """The course of a question's episode."""
        return _plan(self.seed, self.scale, self.subjects[subject], suite_of(subject), subject, member)


def suite_of(subject: int) -> str:
    """The suite of a subject."""
    return SUITES[subject // MOST_QUESTIONS]


def asked(questions: int) -> dict[str, range]:
    """The subjects of each suite's first questions."""
    return {
        suite: range(number * MOST_QUESTIONS, number * MOST_QUESTIONS + questions)
        for number, suite in enumerate(SUITES)
    }


@lru_cache(maxsize=1 << 13)
def _plan(seed: int, scale: float, subject: Subject, suite: str, number: int, member: int) -> EpisodePlan:
    profile = PROFILES[suite]
    chance = random.Random(f"evaluation/{seed}/{number}/{member}")
    count = chance.choices(range(1, len(profile.turns) + 1), profile.turns)[0]
    # No query twice: each search is one for the embedding service, for every contender.
    queries: list[str | None] = [*chance.sample(subject.queries, count - 1), None]
    turns = []
    for query in queries:
        tokens = min(TOKENS_MOST, chance.lognormvariate(0, TOKENS_SPREAD) * profile.tokens)
        seconds = scale * (PREFILL + tokens * DECODE) * chance.lognormvariate(0, JITTER)
        rest = _ANSWER_TOKENS if query is None else _CALL_TOKENS
        turns.append(TurnPlan(seconds, max(6, round(tokens) - rest), query))
    return EpisodePlan(tuple(turns), chance.random() < subject.chance_right)


def write_questions(world: SuiteWorld, suite: str, subjects: Sequence[int], path: Path) -> None:
    """A suite's questions in the form of the published files."""
    rows = (
        {
            "id": f"{suite}_{subject}",
            "question": world.subjects[subject].question,
            "golden_answers": [world.subjects[subject].answer],
        }
        for subject in subjects
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
