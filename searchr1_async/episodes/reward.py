"""What an episode is worth: exact match, F1 and cover match with SQuAD normalisation, and the recipe's formula over them.

A reward is any ``async def reward(episode) -> float`` (or a float with named parts, see :class:`Score`); the engine calls it
once, when the episode has ended. A plain ``def`` is called in a worker thread, so that it may block; of several episodes it may
be called at once.
"""

from __future__ import annotations

import inspect
import re
import string
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from searchr1_async.boundary.settings import check_settings
from searchr1_async.boundary.values import as_number, plain, shown, shown_with_kind
from searchr1_async.episodes.types import Episode, Turn
from searchr1_async.errors import ConfigurationError, RewardError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANSWER_PREFIX = re.compile(r"answer\s*:", re.IGNORECASE)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space.

    As published, so that scores can be compared: punctuation is that of ASCII alone, and Unicode is not normalised. A curly
    quote or a decomposed accent makes another answer, and "well-known" becomes "wellknown".

    Source: the official SQuAD evaluation script (Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions").
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str | None, golden_answers: tuple[str, ...]) -> float:
    """1.0 where the normalised answer equals any normalised golden answer, else 0.0; an empty answer is never right."""
    if answer is None:
        return 0.0
    normalised = normalize_answer(answer)
    return float(bool(normalised) and any(normalised == normalize_answer(golden) for golden in golden_answers))


def f1_score(answer: str | None, golden_answers: tuple[str, ...]) -> float:
    """The best token-level F1 of the answer against any golden answer, in [0, 1] (Rajpurkar et al., 2016)."""
    if answer is None:
        return 0.0
    answer_words = normalize_answer(answer).split()
    best = 0.0
    for golden in golden_answers:
        golden_words = normalize_answer(golden).split()
        overlap = sum((Counter(answer_words) & Counter(golden_words)).values())
        if overlap:
            best = max(best, 2 * overlap / (len(answer_words) + len(golden_words)))
    return best


def cover_match(answer: str | None, golden_answers: tuple[str, ...]) -> float:
    """1.0 where any normalised golden answer stands in the normalised answer as whole words, else 0.0.

    What exact match refuses only for the words around it: "it was Mount Etna in Sicily" covers "Etna". An answer that lists
    every guess covers too, so it is read beside exact match and never trained on by itself. FlashRAG's ``sub_em`` takes any
    part of the text, where "party" covers "art", and a golden answer that normalises to nothing is covered by every answer;
    here by none. What covers here covers there as well, so this is never the larger one.
    """
    if answer is None:
        return 0.0
    words = f" {normalize_answer(answer)} "
    normalised = (normalize_answer(golden) for golden in golden_answers)
    return float(any(golden and f" {golden} " in words for golden in normalised))


def answer_after_prefix(text: str) -> str | None:
    """The answer behind the last ``Answer:`` (in any case) up to the end of its line; None where there is none or it is empty.

    Takes the last of several, since a model that reasons aloud may name the word before it decides; bold marks and
    quotes around the answer are dropped.
    """
    answer: str | None = None
    for match in _ANSWER_PREFIX.finditer(text):
        line = text[match.end() :].strip().split("\n", 1)[0]
        answer = line.strip().strip("*`\"'").strip() or None
    return answer


def strict_recipe_answer(text: str) -> str | None:
    """The answer exactly as the ancestor's recipe reads it: case-sensitive, none where "Answer:" stands twice, "" counts."""
    before, found, after = text.partition("Answer:")
    del before
    if not found or "Answer:" in after:
        return None
    return after.strip()


@dataclass(frozen=True, slots=True)
class Score:
    """A reward and the named parts that explain it. True and False count as 1 and 0."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """A part that does not apply to an episode is left out."""


STANDARD_PARTS = frozenset({"correct", "format", "f1", "cover"})
"""What is measured of every episode: exact match, whether an answer could be read, F1, and cover match."""


def as_reward(name: str, value: Any) -> Any:
    """A function, or an object that can be called, which takes an episode.

    Raises:
        ConfigurationError: it is none.
    """
    if isinstance(value, type):
        raise ConfigurationError(f"{name} is the class {value.__name__}: give an object of it, {value.__name__}()")
    if not callable(value):
        raise ConfigurationError(
            f"{name} is {shown_with_kind(value)}: give a function, such as `async def reward(episode): return 1.0`"
        )
    try:
        inspect.signature(value).bind(None)
    except TypeError as error:
        raise ConfigurationError(f"{name} cannot be called with one argument, the episode: {error}") from None
    except ValueError:  # of a function that is written in C nothing is known
        pass
    return value


RewardFunction = Annotated[Callable[[Episode], Awaitable[float | Score] | float | Score], as_reward]
"""Async or plain; see the module's docstring."""
REWARD_THREADS = 32
"""Calls of a plain reward function at once."""
_threads: RunVar[anyio.CapacityLimiter] = RunVar("threads of plain reward functions")


@dataclass(frozen=True, slots=True)
class RecipeReward:
    """``format_coefficient * (format - 1) + correct``: -0.1, 0 or 1 with the defaults.

    ``correct`` is exact match; ``format`` is 1 where an answer could be read. ``f1`` and ``cover`` (cover match) are measured
    beside them.
    """

    format_coefficient: float = 0.1
    strict_recipe: bool = False
    """Score exactly as the ancestor does: its answer rule on the text of the last turn, in the "Answer:" format only."""

    def __post_init__(self) -> None:
        check_settings(self)

    async def __call__(self, episode: Episode) -> Score:
        answer = episode.answer
        if self.strict_recipe:
            last: Turn | None = episode.turns[-1] if episode.turns else None
            readable = last is not None and not last.truncated and not (last.call and last.call.problem)
            answer = strict_recipe_answer(last.content) if last is not None and readable else None
        format_ok = float(answer is not None)
        golden = episode.question.golden_answers
        if self.strict_recipe:
            # The recipe lets an empty answer match a golden answer that normalises to nothing.
            correct = float(answer is not None and any(normalize_answer(answer) == normalize_answer(g) for g in golden))
        else:
            correct = exact_match(answer, golden)
        reward = self.format_coefficient * (format_ok - 1) + correct
        parts = {"correct": correct, "format": format_ok}
        return Score(reward, {**parts, "f1": f1_score(answer, golden), "cover": cover_match(answer, golden)})


async def score(episode: Episode, reward: RewardFunction) -> Episode:
    """The episode with its reward. :data:`STANDARD_PARTS` are always among its parts, whatever the reward function.

    Raises:
        RewardError: the function raised, or the reward or a part of it is no finite number.
    """
    try:
        given = await _called(reward, episode)
    except Exception as error:
        raise RewardError(
            f"the reward function failed on question {episode.question.id!r}: {type(error).__name__}: {error}"
        ) from error
    result = given if isinstance(given, Score) else Score(given)
    if not isinstance(result.parts, Mapping):
        raise RewardError(
            f"the reward function returned the parts {shown_with_kind(result.parts)} for question {episode.question.id!r}: "
            "return a dict of finite numbers by name"
        )
    total = _finite(result.reward, "", episode)
    parts = {name: _finite(value, f" as its part {name!r}", episode) for name, value in result.parts.items()}
    if not parts.keys() >= STANDARD_PARTS:
        parts = {**(await RecipeReward()(episode)).parts, **parts}
    return replace(episode, reward=total, reward_parts=parts)


async def _called(reward: Callable[[Episode], Any], episode: Episode) -> Any:
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004
        return await reward(episode)
    try:
        threads = _threads.get()
    except LookupError:
        _threads.set(threads := anyio.CapacityLimiter(REWARD_THREADS))
    given = await anyio.to_thread.run_sync(reward, episode, limiter=threads, abandon_on_cancel=True)
    return await given if inspect.isawaitable(given) else given


def _finite(value: Any, place: str, episode: Episode) -> float:
    found = plain(value)
    try:
        return float(found) if isinstance(found, bool) else as_number("reward", found)
    except ConfigurationError:
        raise RewardError(
            f"the reward function returned {shown(value)}{place} for question {episode.question.id!r}: return a finite number"
        ) from None
