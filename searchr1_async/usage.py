"""Billed tokens by kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from searchr1_async.episodes.types import Episode


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens a service was asked to process, by kinds that have a price."""

    prompt: int = 0
    """Prompt tokens for sampling: the whole prompt of every turn of every sample."""
    cached: int = 0
    """The part of ``prompt`` billed as prefix-cache hits."""
    sampled: int = 0
    """Tokens the model generated."""
    trained: int = 0
    """Input tokens of forward-backward passes, prompt and answer alike; an input lacks its example's last token."""

    @property
    def fresh(self) -> int:
        """Prompt tokens billed at the full price."""
        return self.prompt - self.cached

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.sampled + other.sampled,
            self.trained + other.trained,
        )

    def __sub__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.prompt - other.prompt,
            self.cached - other.cached,
            self.sampled - other.sampled,
            self.trained - other.trained,
        )

    def __str__(self) -> str:
        return (
            f"{self.prompt:,} prompt tokens ({self.cached:,} of them cached), {self.sampled:,} sampled and "
            f"{self.trained:,} trained tokens"
        )


def total_usage(usages: Iterable[TokenUsage]) -> TokenUsage:
    """Sum of usages."""
    return sum(usages, start=TokenUsage())


def prompt_lengths(episode: Episode) -> Iterator[int]:
    """Prompt tokens of each turn."""
    length = len(episode.prompt_tokens)
    for turn in episode.turns:
        yield length
        length += len(turn.sampled_tokens) + len(turn.appended_tokens)


def sampling_usage(episode: Episode) -> TokenUsage:
    """Usage of an episode's recorded turns, without a failed or cancelled turn."""
    return TokenUsage(
        prompt=sum(prompt_lengths(episode)),
        cached=sum(turn.cached_prompt_tokens for turn in episode.turns),
        sampled=episode.action_token_count,
    )
