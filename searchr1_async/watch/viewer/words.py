"""What an episode came to, in words: one table for cells, pages and reports. Pure."""

from __future__ import annotations

import math
from typing import Literal

from searchr1_async.episodes.types import Episode, StopReason

Verdict = Literal["right", "wrong", "unscored"]

STOP_WORDS: dict[StopReason, str] = {
    StopReason.ANSWER: "it gave its answer",
    StopReason.NO_ANSWER: "it ended its turn with neither a call nor an answer",
    StopReason.MALFORMED_CALL: "its tool call could not be read",
    StopReason.MAX_TURNS: "it still wanted to search in its last allowed turn",
    StopReason.MAX_TURN_TOKENS: "a turn reached its token limit and was cut",
    StopReason.MAX_TRAJECTORY_TOKENS: "the next turn would not have fitted into the episode's token limit",
    StopReason.NOT_EXTENDABLE: "the chat format cannot go on behind these tokens",
    StopReason.TIME_LIMIT: "it took longer than it may and was cut",
    StopReason.FAILED: "a service failed",
}

DROP_WORDS: dict[str, str] = {
    "constant_reward": "all episodes of its group got the same reward, so there is nothing to learn from",
    "too_few_episodes": "too few episodes of its group were finished",
    "too_slow": "its group was too slow and was left behind",
    "step_time_limit": "the step's time was over",
    "failed": "it was not finished: a service failed, or it took too long",
}

TOO_LONG = (StopReason.MAX_TURNS, StopReason.MAX_TURN_TOKENS, StopReason.MAX_TRAJECTORY_TOKENS)


def verdict(episode: Episode) -> Verdict:
    """Whether its answer is right. Nothing is said of an episode that a fault or a clock ended, or without a golden answer."""
    if not episode.is_complete or not episode.question.golden_answers:
        return "unscored"
    return "right" if episode.reward_parts.get("correct", 0.0) >= 0.5 else "wrong"


MARKS: dict[Verdict, str] = {"right": "✓", "wrong": "✗", "unscored": "–"}


def marked(episode: Episode, answer: str) -> str:
    """The answer behind the mark of its verdict; of a question without a golden answer just that."""
    return f"{MARKS[verdict(episode)]} {answer}" if episode.question.golden_answers else answer


def drop_words(reason: str) -> str:
    """A reason for not training on an episode, in words; one that is not known is given as it is."""
    return DROP_WORDS.get(reason, reason)


def learning_words(
    episode: Episode,
    advantage: float | None,
    trained: bool | None,
    drop_reason: str | None,
    *,
    is_evaluation: bool = False,
) -> str:
    """What of the episode was learned from, and what was masked.

    Args:
        episode: the episode.
        advantage: its own; None where there is none.
        trained: None where nobody says.
        drop_reason: why it was not trained on.
        is_evaluation: it was played to measure.
    """
    wrote, read = tokens(episode.action_token_count), tokens(episode.observation_token_count)
    if not episode.question.golden_answers:
        return f"The model wrote {wrote} and read {read} (grey)."
    if is_evaluation:
        return f"Not trained on: it was played to measure. The model wrote {wrote} and read {read} (grey)."
    if trained is False:
        why = f": {drop_words(drop_reason)}" if drop_reason else ""
        return f"Not trained on{why}. The model wrote {wrote} and read {read} (grey)."
    masked = f"The {read} that it read, prompt and search results (grey), are masked."
    if trained is None:
        return f"Only the {wrote} that the model wrote can be learned from. {masked}"
    by = f", by an advantage of {advantage:+.3g}" if advantage is not None and math.isfinite(advantage) else ""
    return f"Learned from the {wrote} that the model wrote{by}. {masked}"


def tokens(count: int) -> str:
    """``1 token``, ``1,200 tokens``."""
    return counted(count, "token")


def counted(count: int, noun: str) -> str:
    """A count with its noun, which takes an ``s`` for any other number than one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def source_words(step: int | None, label: str | None) -> str:
    """Where an episode comes from: ``step 12``, ``evaluation "after RL"``."""
    if label is not None:
        return f"evaluation “{label}”"
    return "rollout" if step is None else f"step {step}"


def reward_words(episode: Episode) -> str:
    """The reward and its parts: ``reward 1.1 (correct 1, format 1)``; of an episode that was not scored, that."""
    if not episode.is_complete or not episode.question.golden_answers:
        return "not scored"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in episode.reward_parts.items())
    return f"reward {episode.reward:.3g}" + (f" ({parts})" if parts else "")
