"""Tokens that a service bills, counted by kind. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from searchr1_async.episodes.types import Episode


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """How many tokens a service was asked to process, by the kinds that have a price."""

    prompt: int = 0
    """Prompt tokens sent to be sampled from: the whole prompt of every turn of every sample."""
    cached: int = 0
    """Prompt tokens, among ``prompt``, that are billed as prefix-cache hits."""
    sampled: int = 0
    """Tokens written by the model."""
    trained: int = 0
    """Tokens of the inputs of forward-backward passes; prompt and answer count alike. An input lacks its example's last token."""

    @property
    def fresh(self) -> int:
        """Prompt tokens that are billed at the full price."""
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
    """Their sum."""
    return sum(usages, start=TokenUsage())


def prompt_lengths(episode: Episode) -> Iterator[int]:
    """The number of tokens in the prompt of each turn."""
    length = len(episode.prompt_tokens)
    for turn in episode.turns:
        yield length
        length += len(turn.sampled_tokens) + len(turn.appended_tokens)


def sampling_usage(episode: Episode) -> TokenUsage:
    """What playing an episode used: its recorded turns, without a turn that failed or was cancelled."""
    return TokenUsage(
        prompt=sum(prompt_lengths(episode)),
        cached=sum(turn.cached_prompt_tokens for turn in episode.turns),
        sampled=episode.action_token_count,
    )
