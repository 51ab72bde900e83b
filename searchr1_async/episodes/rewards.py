"""Rewards: exact match, F1 and cover match with SQuAD normalization, and the recipe's formula.

A reward is any ``async def reward(episode) -> float`` (or :class:`Score`), called once when an episode has ended. A plain
``def`` runs in a worker thread, so it may block, and must be thread-safe. This module is ``sr.rewards``.
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

from searchr1_async.boundary.settings import check, check_settings, plain, shown, shown_with_kind
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError, RewardError

__all__ = ["RecipeReward", "RewardFunction", "Score", "cover_match", "exact_match", "f1", "normalize_answer"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANSWER_PREFIX = re.compile(r"answer\s*:", re.IGNORECASE)


def normalize_answer(text: str) -> str:
    """Lowercases, and removes punctuation, articles and extra whitespace.

    As published, for comparable scores: only ASCII punctuation, no Unicode normalization. A curly quote or decomposed accent
    makes a different answer, and "well-known" becomes "wellknown".

    Source: the official SQuAD evaluation script (Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions").
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str | None, golden_answers: tuple[str, ...]) -> float:
    """1.0 if the normalized answer equals a normalized golden answer, else 0.0; an empty answer scores 0."""
    if answer is None:
        return 0.0
    normalised = normalize_answer(answer)
    return float(bool(normalised) and any(normalised == normalize_answer(golden) for golden in golden_answers))


def f1(answer: str | None, golden_answers: tuple[str, ...]) -> float:
    """Best token-level F1 of the answer against any golden answer, in [0, 1] (Rajpurkar et al., 2016)."""
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
    """1.0 if the normalized answer contains a normalized golden answer as whole words, else 0.0.

    "it was Mount Etna in Sicily" covers "Etna". Answers that list every guess cover too: read it beside exact match, and do not
    train on it alone. Never above FlashRAG's ``sub_em``, which also matches parts of words ("party" covers "art") and golden
    answers that normalize to nothing.
    """
    if answer is None:
        return 0.0
    words = f" {normalize_answer(answer)} "
    normalised = (normalize_answer(golden) for golden in golden_answers)
    return float(any(golden and f" {golden} " in words for golden in normalised))


def answer_after_prefix(text: str) -> str | None:
    """The rest of the line after the last ``Answer:`` (any case); None if missing or empty.

    The last one, since reasoning may mention the word earlier. Surrounding bold marks and quotes are dropped.
    """
    answer: str | None = None
    for match in _ANSWER_PREFIX.finditer(text):
        line = text[match.end() :].strip().split("\n", 1)[0]
        answer = line.strip().strip("*`\"'").strip() or None
    return answer


def strict_recipe_answer(text: str) -> str | None:
    """The answer as parsed by the original recipe: case-sensitive, None if "Answer:" occurs twice, "" counts."""
    parts = text.split("Answer:")
    return parts[1].strip() if len(parts) == 2 else None


@dataclass(frozen=True, slots=True)
class Score:
    """A reward with named parts. Booleans count as 1 and 0."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Omit parts that do not apply to an episode."""


STANDARD_PARTS = frozenset({"correct", "format", "f1", "cover"})
"""Computed for every episode: exact match, whether an answer was parsed, F1, and cover match."""


def as_reward(name: str, value: Any) -> Any:
    """Validates a callable that takes an episode."""
    try:
        if isinstance(value, type):
            raise TypeError(f"give an instance, {value.__name__}()")
        inspect.signature(value).bind(None)
    except TypeError as error:
        raise ConfigurationError(
            f"{name} is {shown_with_kind(value)}, which cannot be called with one argument, the episode: {error}. Give a function, "
            "such as `async def reward(episode): return 1.0`"
        ) from None
    except ValueError:  # C functions may have no signature
        pass
    return value


RewardFunction = Annotated[Callable[[Episode], Awaitable[float | Score] | float | Score], as_reward]
"""Async or plain; see the module docstring."""
REWARD_THREADS = 32
"""Concurrent calls of a plain reward function."""
_threads: RunVar[anyio.CapacityLimiter] = RunVar("threads of plain reward functions")


@dataclass(frozen=True, slots=True)
class RecipeReward:
    """``format_coefficient * (format - 1) + correct``: -0.1, 0 or 1 with the defaults.

    ``correct`` is exact match; ``format`` is 1 if an answer was parsed. Also reports ``f1`` and ``cover`` (cover match).
    """

    format_coefficient: float = 0.1
    strict_recipe: bool = False
    """Score exactly as the original recipe: its answer rule on the last turn's text, "Answer:" format only."""

    def __post_init__(self) -> None:
        check_settings(self)

    async def __call__(self, episode: Episode) -> Score:
        answer, golden = episode.answer, episode.question.golden_answers
        if self.strict_recipe:
            last = episode.turns[-1] if episode.turns else None
            is_read = last is not None and not last.truncated and not (last.call and last.call.problem)
            answer = strict_recipe_answer(last.content) if last is not None and is_read else None
            # In the recipe an empty answer matches a golden answer that normalizes to nothing.
            correct = float(answer is not None and normalize_answer(answer) in map(normalize_answer, golden))
        else:
            correct = exact_match(answer, golden)
        format_ok = float(answer is not None)
        parts = {
            "correct": correct,
            "format": format_ok,
            "f1": f1(answer, golden),
            "cover": cover_match(answer, golden),
        }
        return Score(self.format_coefficient * (format_ok - 1) + correct, parts)


async def score(episode: Episode, reward: RewardFunction) -> Episode:
    """Returns the episode with its reward; adds :data:`STANDARD_PARTS` if the reward function lacks them."""
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
        return float(found) if isinstance(found, bool) else check("reward", found, float)
    except ConfigurationError:
        raise RewardError(
            f"the reward function returned {shown(value)}{place} for question {episode.question.id!r}: return a finite number"
        ) from None
