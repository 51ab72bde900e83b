"""Descriptions of an episode's outcome, shared by cells, pages and reports. Pure."""

from __future__ import annotations

import math
from typing import Literal

from searchr1_async.episodes.types import Episode, StopReason

Verdict = Literal["right", "wrong", "unscored"]

STOP_WORDS: dict[StopReason, str] = {
    StopReason.ANSWER: "it gave its answer",
    StopReason.NO_ANSWER: "its last turn had neither a call nor an answer",
    StopReason.MALFORMED_CALL: "its tool call could not be parsed",
    StopReason.MAX_TURNS: "its last allowed turn was another search",
    StopReason.MAX_TURN_TOKENS: "a turn was cut at its token limit",
    StopReason.MAX_TRAJECTORY_TOKENS: "the next turn would have exceeded the episode's token limit",
    StopReason.NOT_EXTENDABLE: "the chat format cannot be extended after these tokens",
    StopReason.TIME_LIMIT: "it exceeded its time limit and was cut",
    StopReason.FAILED: "a service failed",
}

DROP_WORDS: dict[str, str] = {
    "constant_reward": "all episodes of its group got the same reward, so there is nothing to learn from",
    "too_few_episodes": "too few episodes of its group finished",
    "too_slow": "its group was too slow",
    "step_time_limit": "the step's time limit was reached",
    "failed": "it did not finish: a service failed, or a time limit was reached",
}

TOO_LONG = (StopReason.MAX_TURNS, StopReason.MAX_TURN_TOKENS, StopReason.MAX_TRAJECTORY_TOKENS)


def verdict(episode: Episode) -> Verdict:
    """Whether the answer is right; unscored if the episode failed or timed out, or there is no golden answer."""
    if not episode.is_complete or not episode.question.golden_answers:
        return "unscored"
    return "right" if episode.reward_parts.get("correct", 0.0) >= 0.5 else "wrong"


MARKS: dict[Verdict, str] = {"right": "✓", "wrong": "✗", "unscored": "–"}


def marked(episode: Episode, answer: str) -> str:
    """The answer with its verdict mark; unmarked without a golden answer."""
    return f"{MARKS[verdict(episode)]} {answer}" if episode.question.golden_answers else answer


def drop_words(reason: str) -> str:
    """Description of a drop reason; unknown ones are returned unchanged."""
    return DROP_WORDS.get(reason, reason)


def learning_words(
    episode: Episode,
    advantage: float | None,
    trained: bool | None,
    drop_reason: str | None,
    *,
    is_evaluation: bool = False,
) -> str:
    """Which tokens were trained on, and which were masked.

    Args:
        episode: the episode.
        advantage: of the episode; None if there is none.
        trained: None if unknown.
        drop_reason: why it was not trained on.
        is_evaluation: it belongs to an evaluation.
    """
    wrote, read = tokens(episode.action_token_count), tokens(episode.observation_token_count)
    counts = f"The model sampled {wrote} and read {read} (grey)."
    if not episode.question.golden_answers:
        return counts
    if is_evaluation:
        return f"Not trained on: evaluation episode. {counts}"
    if trained is False:
        why = f": {drop_words(drop_reason)}" if drop_reason else ""
        return f"Not trained on{why}. {counts}"
    masked = f"The {read} of prompt and search results (grey) are masked."
    if trained is None:
        return f"Only the {wrote} sampled by the model can be trained on. {masked}"
    by = f", with advantage {advantage:+.3g}" if advantage is not None and math.isfinite(advantage) else ""
    return f"Trained on the {wrote} sampled by the model{by}. {masked}"


def tokens(count: int) -> str:
    """``1 token``, ``1,200 tokens``."""
    return counted(count, "token")


def counted(count: int, noun: str) -> str:
    """A count with its noun, in the plural unless it is one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def source_words(step: int | None, label: str | None) -> str:
    """Origin of an episode: ``step 12``, ``evaluation "after RL"``."""
    if label is not None:
        return f"evaluation “{label}”"
    return "rollout" if step is None else f"step {step}"


def reward_words(episode: Episode) -> str:
    """Reward and parts: ``reward 1.1 (correct 1, format 1)``, or ``not scored``."""
    if not episode.is_complete or not episode.question.golden_answers:
        return "not scored"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in episode.reward_parts.items())
    return f"reward {episode.reward:.3g}" + (f" ({parts})" if parts else "")
