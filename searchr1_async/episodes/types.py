"""The values that an episode is made of: questions, passages, turns, episodes and groups.

All are frozen: an episode is built turn by turn by :mod:`searchr1_async.episodes.play` and never changed afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from searchr1_async.errors import QuestionsError


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its golden answers.

    Raises:
        QuestionsError: the question is blank, or no golden answer has any text.
    """

    id: str
    """Unique within its suite; the resume point of a run names questions by it."""
    question: str
    golden_answers: tuple[str, ...]
    """Any one of them is right."""
    data_source: str = "unknown"
    """The suite it comes from; metrics are kept by it (``env/<data_source>/…``)."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else its row held (``hop``, ``country``, …)."""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise QuestionsError(f"question {self.id!r} of {self.data_source!r} has no text")
        if not any(answer.strip() for answer in self.golden_answers):
            raise QuestionsError(
                f"question {self.id!r} of {self.data_source!r} has no golden answer: "
                "give it at least one, or leave the row out"
            )


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage of the corpus, as a search found it."""

    id: str
    title: str
    text: str
    score: float = 0.0
    """Similarity, larger is closer (for cosine distance ``1 - distance``)."""


class StopReason(StrEnum):
    """Why an episode ended. Metrics count each as a fraction of *all* episodes (``env/all/stop/<value>``)."""

    ANSWER = "answer"
    """The model gave its answer."""
    NO_ANSWER = "no_answer"
    """The model ended its turn with neither a call nor an answer."""
    MALFORMED_CALL = "malformed_call"
    """The model's tool call could not be read."""
    MAX_TURNS = "max_turns"
    """The model still wanted to search in its last allowed turn; that search is not run."""
    MAX_TURN_TOKENS = "max_turn_tokens"
    """A turn was cut at ``max_tokens``."""
    MAX_TRAJECTORY_TOKENS = "max_trajectory_tokens"
    """The next turn would not fit into ``max_trajectory_tokens`` with its reserve."""
    NOT_EXTENDABLE = "not_extendable"
    """The chat format cannot continue these sampled tokens without changing them (token-exactness comes first)."""
    TIME_LIMIT = "time_limit"
    """It took longer than it may, by the clock, and was cut; never trained on, since what was slow may be the service."""
    FAILED = "failed"
    """A service failed for good: the episode is data about the service, and is never trained on."""


@dataclass(frozen=True, slots=True)
class SearchCall:
    """One tool call that the model made, and what came of it."""

    queries: tuple[str, ...]
    """Empty when the call was malformed."""
    results: tuple[tuple[Passage, ...], ...] = ()
    """Passages for each query; empty when the search was not run (last turn, malformed call)."""
    problem: str | None = None
    """Why the call was malformed, in words; None for a valid one."""
    seconds: float = 0.0
    """From asking the search to its answer."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One sampled turn, and the tokens that were appended after it."""

    sampled_tokens: tuple[int, ...]
    """As sampled, the stop token included; never re-encoded."""
    logprobs: tuple[float, ...]
    """Natural-log probabilities of ``sampled_tokens`` under the policy that sampled them; same length."""
    text: str
    """``sampled_tokens`` decoded, for people and parsers."""
    content: str = ""
    """``text`` without chat markup and reasoning: what the turn says."""
    policy_version: int = 0
    """Optimiser steps done before the weights that sampled this turn; with weights in flight they may be newer."""
    call: SearchCall | None = None
    appended_tokens: tuple[int, ...] = ()
    """What the renderer put between this turn and the next: the turn's close, the tool result, the next header."""
    seconds: float = 0.0
    """From asking the sampler to its answer."""
    truncated: bool = False
    """The sampler stopped for length."""
    sequence_id: str | None = None
    """The service's name for ``sampled_tokens``, known in the session that sampled them; None where it gave none. The turn's
    prompt goes by it too (see :func:`searchr1_async.learn.examples.to_datum`)."""
    cached_prompt_tokens: int = 0
    """Tokens of the turn's prompt that were billed at the price of a cache hit. Of a first turn that members share, one is
    billed as the service answered, and the others' prompts are cached whole."""


@dataclass(frozen=True)
class Episode:
    """One played episode.

    The token sequence is ``prompt_tokens + turn 1 sampled + turn 1 appended + turn 2 sampled + …``: the prompt of turn
    n + 1 is exactly everything before its sampled tokens, so one episode gives one training example.
    """

    question: Question
    prompt_tokens: tuple[int, ...]
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    answer: str | None = None
    """The answer read from the last turn; None when there was none."""
    reward: float = 0.0
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """``correct``, ``format``, ``f1``, …: each becomes a metric ``env/all/<name>``."""
    error: str | None = None
    """The cause, when ``stop_reason`` is FAILED."""
    seconds: float = 0.0
    given: SearchCall | None = None
    """A search that was made for the model before its first turn, whose passages stand in the prompt; see
    :data:`~searchr1_async.episodes.methods.Method`. It is no call of the model's."""

    @property
    def failed(self) -> bool:
        """A service failed it."""
        return self.stop_reason is StopReason.FAILED

    @property
    def is_complete(self) -> bool:
        """The model ended it, not a fault or a clock: only such episodes are scored and trained on."""
        return self.stop_reason not in (StopReason.FAILED, StopReason.TIME_LIMIT)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The whole sequence, up to and including the last sampled token (nothing is appended after the last turn)."""
        out = list(self.prompt_tokens)
        for turn in self.turns:
            out.extend(turn.sampled_tokens)
            out.extend(turn.appended_tokens)
        return tuple(out)

    @property
    def action_token_count(self) -> int:
        return sum(len(turn.sampled_tokens) for turn in self.turns)

    @property
    def observation_token_count(self) -> int:
        """Prompt and appended tokens: everything that the model read and did not write."""
        return len(self.tokens) - self.action_token_count

    @property
    def calls(self) -> tuple[SearchCall, ...]:
        return tuple(turn.call for turn in self.turns if turn.call is not None)


@dataclass(frozen=True)
class Group:
    """The finished episodes of one question: the unit over which advantages are centred."""

    question: Question
    episodes: tuple[Episode, ...]
    """Complete ones only."""
    failed: tuple[Episode, ...] = ()
    """Those that a service failed or a time limit cut."""

    @cached_property
    def rewards(self) -> tuple[float, ...]:
        return tuple(episode.reward for episode in self.episodes)

    @property
    def is_constant(self) -> bool:
        """No member did better than another, so every advantage is 0 and there is nothing to learn."""
        return len(self.episodes) < 2 or max(self.rewards) - min(self.rewards) < 1e-9

    @property
    def policy_versions(self) -> tuple[int, ...]:
        return tuple(sorted({turn.policy_version for episode in self.episodes for turn in episode.turns}))
