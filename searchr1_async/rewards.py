"""Rewards and their parts, as ``sr.rewards``.

A reward is any function of an :class:`~searchr1_async.episodes.types.Episode` to a number or a :class:`Score`; see
:data:`RewardFunction`.
"""

from searchr1_async.episodes.reward import (
    RecipeReward,
    RewardFunction,
    Score,
    cover_match,
    exact_match,
    f1,
    normalize_answer,
)

__all__ = ["RecipeReward", "RewardFunction", "Score", "cover_match", "exact_match", "f1", "normalize_answer"]
