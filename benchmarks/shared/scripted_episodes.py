"""What the throughput benchmarks play: questions, passages, and the course of every episode.

The course of an episode (how many turns, how long each is and takes, what is searched for, whether the answer is right) depends
on nothing but the question and the episode's number in its group. So every contender plays the same episodes in the same
batches, and the best possible time of a run can be computed from them.

Turns are as long as those of a 4B model that learned to search: lognormal with a median of 60 tokens, 1 to 5 an episode. A turn
takes :data:`PREFILL` and :data:`DECODE` a token, times a lognormal factor; a median turn 1.2 s, the longest of 1,024 episodes 20
to 30 s.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.local.process import Served

GROUP_SIZE = 8
TURNS = {1: 0.12, 2: 0.38, 3: 0.30, 4: 0.14, 5: 0.06}
"""How many episodes have how many turns; the last one answers."""
TOKENS_MEDIAN, TOKENS_SPREAD, TOKENS_MOST = 60.0, 0.7, 700
"""Tokens of a turn and the standard deviation of their logarithm."""
PREFILL, DECODE, JITTER = 0.25, 0.015, 0.5
"""Seconds a turn, seconds a token, and the standard deviation of the logarithm of what both are multiplied by."""
SHARED = 0.76
"""Fraction of searches whose query is one of the question's; the others are reworded, as in benchmarks/search."""
MARKER = "zebra"
"""A word that stands before a number which the model reads, and nowhere else; one token after a space."""
QUESTION_DIGITS, MEMBER_DIGITS = 5, 2
WORLD_VARIABLE = "SEARCHR1_BENCHMARK_WORLD"
"""The environment variable that names the world's file for a scripted model."""
_MESSAGES_AT_FIRST = 3
"""System, user, and the opened reply."""
_CALL_TOKENS = 30
"""About what a call takes beside its query."""

INSTRUCTIONS = """You answer questions with the help of a search tool over an encyclopedia.

How to work:
1. Before you call the tool, think: what has to be known, in which order, and which query would find it.
2. Call the tool with one or more queries. A query is complete in itself, since the tool knows nothing of the question.
3. Read the passages. Note what they say that brings you closer, and what is still missing.
4. Search again while something is missing, with queries made of what you have found. Do not repeat a query that failed.
5. When you know the answer, write it behind "Answer:" in one to five words, without an explanation and without a period.

An example. The question is: which river flows through the capital of the country whose highest mountain is Triglav?
First I need the country. Triglav is a mountain, so I search for the country that it stands in.
<tool_call>{"name": "search", "arguments": {"query_list": ["Triglav highest mountain country"]}}</tool_call>
The passages say that Triglav is the highest mountain of Slovenia. The capital of Slovenia is Ljubljana. I need the river there.
<tool_call>{"name": "search", "arguments": {"query_list": ["river through Ljubljana capital of Slovenia"]}}</tool_call>
The passages say that the Ljubljanica flows through Ljubljana, so that is the river that was asked for.
Answer: Ljubljanica

Keep in mind that passages may be old, may be about something else of the same name, or may contradict one another. Prefer the
passage that speaks of the very thing that was asked for, and check a year or a number in a second passage where there is one.
"""
"""As long as the recipe's: with the tool's signature and a question the first prompt has about 700 tokens."""


@dataclass(frozen=True)
class Subject:
    """A question and what may be searched for on the way to its answer."""

    question: str
    answer: str
    queries: tuple[str, ...]
    chance_right: float
    """Of an episode to answer right: groups differ in it, as questions differ in difficulty."""


@dataclass(frozen=True)
class TurnPlan:
    """One sampled turn."""

    seconds: float
    filler: int
    """Words of thinking."""
    query: str | None
    """None answers."""


@dataclass(frozen=True)
class EpisodePlan:
    """The course of one episode."""

    turns: tuple[TurnPlan, ...]
    is_right: bool


@dataclass(frozen=True)
class World:
    """All questions, and what the model needs to read its prompts without a tokenizer."""

    seed: int
    scale: float
    """All latencies are multiplied by it."""
    subjects: tuple[Subject, ...]
    words: tuple[str, ...]
    marker: int = 0
    """The token of :data:`MARKER` after a space."""
    digits: tuple[int, ...] = field(default=())
    """The tokens of 0 to 9."""
    turn_start: int = 0
    """The token that opens a message."""

    def save(self, path: Path) -> None:
        """As JSON, for the processes that play it."""
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> World:
        """What :meth:`save` wrote."""
        values = json.loads(path.read_text())
        subjects = tuple(Subject(**{**each, "queries": tuple(each["queries"])}) for each in values["subjects"])
        return World(
            **{**values, "subjects": subjects, "words": tuple(values["words"]), "digits": tuple(values["digits"])}
        )

    def plan(self, subject: int, member: int) -> EpisodePlan:
        """The course of a question's episode, its ``member``-th."""
        return _plan(self, subject, member)


@lru_cache(maxsize=1 << 15)
def _plan_of(seed: int, scale: float, subject: Subject, number: int, member: int) -> EpisodePlan:
    chance = random.Random(f"plan/{seed}/{number}/{member}")
    count = chance.choices(list(TURNS), list(TURNS.values()))[0]
    turns = []
    for turn in range(count):
        tokens = min(TOKENS_MOST, chance.lognormvariate(0, TOKENS_SPREAD) * TOKENS_MEDIAN)
        seconds = scale * (PREFILL + tokens * DECODE) * chance.lognormvariate(0, JITTER)
        is_last = turn == count - 1
        filler = max(6, round(tokens) - (6 if is_last else _CALL_TOKENS))
        turns.append(TurnPlan(seconds, filler, None if is_last else _query(subject, chance)))
    return EpisodePlan(tuple(turns), chance.random() < subject.chance_right)


def _plan(world: World, subject: int, member: int) -> EpisodePlan:
    return _plan_of(world.seed, world.scale, world.subjects[subject], subject, member)


def _query(subject: Subject, chance: random.Random) -> str:
    query = chance.choice(subject.queries)
    if chance.random() < SHARED:
        return query
    words = query.split()
    words.insert(chance.randrange(len(words) + 1), chance.choice(chance.choice(subject.queries).split()))
    words[chance.randrange(len(words))] = chance.choice(subject.question.split()[-6:])
    return " ".join(words)


def make_world(tokenizer: Any, subjects: int, *, seed: int, scale: float) -> World:
    """Questions of words that the tokenizer knows whole.

    Raises:
        ValueError: the marker or a digit is not one token.
    """
    chance = random.Random(f"world/{seed}")
    known = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [token[1:] for token, _ in known if re.fullmatch("Ġ[a-z]{4,9}", token) and token[1:] != MARKER][:6_000]
    made = []
    for number in range(subjects):
        topic = chance.sample(words[500:], 8)
        queries = tuple(" ".join(chance.sample(topic, 4) + chance.choices(words[:500], k=2)) for _ in range(4))
        question = f"Question {MARKER} {number:0{QUESTION_DIGITS}d}: who was the {' '.join(topic[:6])}?"
        made.append(Subject(question, " ".join(topic[6:]), queries, chance.uniform(0.05, 0.95)))
    return World(
        seed=seed,
        scale=scale,
        subjects=tuple(made),
        words=tuple(words[:500]),
        marker=_one_token(tokenizer, f" {MARKER}"),
        digits=tuple(_one_token(tokenizer, str(digit)) for digit in range(10)),
        turn_start=_one_token(tokenizer, "<|im_start|>"),
    )


def _one_token(tokenizer: Any, text: str) -> int:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise ValueError(f"{text!r} is {len(tokens)} tokens for this tokenizer: the scripted model could not read it")
    return tokens[0]


def make_passages(world: World, count: int) -> pl.DataFrame:
    """``id``, ``title`` and ``text`` of passages of 100 words, in which queries' words occur."""
    chance = random.Random(f"passages/{world.seed}")
    rows = []
    for number in range(count):
        subject = world.subjects[number % len(world.subjects)]
        topic = chance.choice(subject.queries).split()
        text = chance.choices(world.words, k=92) + topic + chance.sample(topic, 2)
        chance.shuffle(text)
        rows.append({"id": str(number), "title": " ".join(topic[:2]), "text": " ".join(text)})
    return pl.DataFrame(rows)


def reply_text(world: World, subject: int, member: int, turn: int) -> str:
    """What the model says in a turn: thinking, then a call or an answer. The first turn also says who it is."""
    plan = world.plan(subject, member)
    about = plan.turns[turn]
    start = (subject * 31 + member * 7 + turn) % len(world.words)
    thinking = " ".join(world.words[(start + step) % len(world.words)] for step in range(about.filler))
    if turn == 0:
        thinking = f"Episode {MARKER} {member:0{MEMBER_DIGITS}d}: {thinking}"
    if about.query is not None:
        call = json.dumps({"name": "search", "arguments": {"query_list": [about.query]}})
        return f"{thinking}.\n<tool_call>\n{call}\n</tool_call>"
    answer = world.subjects[subject].answer if plan.is_right else "nobody knows"
    return f"{thinking}.\nAnswer: {answer}"


def shuffled_to(wanted: Sequence[Any], shuffler: random.Random) -> list[Any]:
    """The order to hand out so that ``shuffler.shuffle`` of as many items puts them into the order wanted."""
    places = list(range(len(wanted)))
    shuffler.shuffle(places)
    handed: list[Any] = [None] * len(wanted)
    for position, place in enumerate(places):
        handed[place] = wanted[position]
    return handed


# --- what the scripted models read, and what the service's log says -----------------------------------------------------------


def turn_of(world: World, prompt: Sequence[int]) -> int:
    """The turn that a prompt asks for, from how many messages there are."""
    return (prompt.count(world.turn_start) - _MESSAGES_AT_FIRST) // 2


def number_behind(world: World, prompt: Sequence[int], marker: int, digits: int) -> int:
    """The number of so many digits behind the marker at this place.

    Raises:
        ValueError: there are fewer digits.
    """
    read = [world.digits.index(token) for token in prompt[marker + 1 : marker + 4 + digits] if token in world.digits]
    if len(read) < digits:
        raise ValueError(f"no number of {digits} digits behind the marker")
    return int("".join(map(str, read[:digits])))


@dataclass(frozen=True)
class EpisodeSeen:
    """One episode in the service's log."""

    began: float
    ended: float
    turns: int
    tokens: int
    """Of its one training example: the last prompt and reply, without the last token, which is only predicted."""


def episodes_seen(served: Iterable[Served]) -> dict[tuple[int, int], EpisodeSeen]:
    """Every episode by question and member, from its turns' labels."""
    turns: defaultdict[tuple[int, int], list[tuple[int, float, float, int]]] = defaultdict(list)
    for request in served:
        for sequence in request.sequences:
            subject, member, turn = map(int, sequence.label.split("/"))
            tokens = request.tokens + sequence.tokens - 1
            turns[subject, member].append((turn, request.began, request.ended, tokens))
    return {key: EpisodeSeen(min(each)[1], max(each)[2], max(each)[0] + 1, max(each)[3]) for key, each in turns.items()}
