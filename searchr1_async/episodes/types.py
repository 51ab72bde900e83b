"""The values that an episode is made of: questions, passages, turns, episodes and groups.

All are frozen: an episode is built turn by turn by :mod:`searchr1_async.episodes.play` and never changed afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from numbers import Integral
from typing import Any

from searchr1_async.boundary.cells import is_missing
from searchr1_async.boundary.values import half_a_character, shown, shown_with_kind
from searchr1_async.errors import CorpusError, QuestionsError

_SHOWN_TEXT = 80
"""Characters of a text in a ``repr``."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its golden answers.

    A whole number as ``id`` becomes text, a list of golden answers a tuple, and a single text the only golden answer.

    Raises:
        QuestionsError: the question is blank, golden answers are given and none has any text, or a field is of another type.
    """

    id: str
    """Unique within its suite; the resume point of a run names questions by it."""
    question: str
    golden_answers: tuple[str, ...] = ()
    """Any one of them is right. Empty where the answer is not known: such a question can be asked
    (:func:`searchr1_async.ask`), but not trained on or measured with, since no reward can be computed."""
    data_source: str = "unknown"
    """The suite it comes from; metrics are kept by it (``env/<data_source>/…``)."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else its row held (``hop``, ``country``, …)."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            object.__setattr__(self, "id", _id_text(self.id, "question", QuestionsError))
        are_texts = isinstance(self.question, str) and isinstance(self.data_source, str)
        if not are_texts or not isinstance(
            self.metadata, dict | Mapping
        ):  # dict first: an abstract class takes its time
            raise self._mistyped()
        if not self.question.strip():
            raise QuestionsError(f"question {self.id!r} of {self.data_source!r} has no text")
        answers = self._answers()
        if answers is not self.golden_answers:
            object.__setattr__(self, "golden_answers", answers)
        if answers and not any(map(str.strip, answers)):
            raise self._unanswered()

    def check_scorable(self) -> None:
        """Refuses a question that no reward can be computed for, or whose text no file can hold.

        Raises:
            QuestionsError: no golden answer has any text, or a text holds half a character.
        """
        if not any(map(str.strip, self.golden_answers)):
            raise self._unanswered()
        for text in (self.id, self.question, self.data_source, *self.golden_answers):
            if not text.isascii() and half_a_character(text) is not None:
                raise QuestionsError(
                    f"{self._name} holds half a character (a lone surrogate) in {shown(text)}: read its file as UTF-8"
                )

    def _answers(self) -> tuple[str, ...]:
        given: Any = self.golden_answers
        if isinstance(given, str):
            return (given,)
        if not isinstance(given, list | tuple) and type(given).__module__ == "numpy":  # a cell of a pandas frame
            given = given.tolist()
        if not isinstance(given, list | tuple):
            raise QuestionsError(
                f"{self._name} has golden_answers that are {shown_with_kind(given)}: give a tuple of texts, such as ('Paris',)"
            )
        for answer in given:
            if not isinstance(answer, str):
                place = next(place for place, each in enumerate(given, start=1) if each is answer)
                raise QuestionsError(
                    f"{self._name} has a golden answer that is no text: number {place} is {shown_with_kind(answer)}"
                )
        return tuple(given)

    def _mistyped(self) -> QuestionsError:
        for name in ("question", "data_source"):
            if not isinstance(found := getattr(self, name), str):
                return QuestionsError(f"question {self.id!r} has a {name} that is {shown_with_kind(found)}: give text")
        return QuestionsError(f"{self._name} has metadata that is {shown_with_kind(self.metadata)}: give a dict")

    @property
    def _name(self) -> str:
        return f"question {self.id!r} of {self.data_source!r}"

    def _unanswered(self) -> QuestionsError:
        return QuestionsError(f"{self._name} has no golden answer: give it at least one, or leave the row out")


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage of the corpus, as a search found it.

    A whole number as ``id`` becomes text, and a missing title (None, NaN) "".

    Raises:
        CorpusError: a field is of another type.
    """

    id: str
    title: str
    text: str
    score: float = 0.0
    """Similarity, larger is closer (for cosine distance ``1 - distance``)."""

    def __post_init__(self) -> None:
        if isinstance(self.id, str) and isinstance(self.title, str) and isinstance(self.text, str):
            return
        if not isinstance(self.id, str):
            object.__setattr__(self, "id", _id_text(self.id, "passage", CorpusError))
        if is_missing(self.title):
            object.__setattr__(self, "title", "")
        for name in ("title", "text"):
            if not isinstance(found := getattr(self, name), str):
                raise CorpusError(f"passage {self.id!r} has a {name} that is {shown_with_kind(found)}: give text")


def _id_text(given: Any, what: str, error: type[QuestionsError | CorpusError]) -> str:
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise error(f"a {what} has the id {shown_with_kind(given)}: give text or a whole number")
    return str(int(given))


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


@dataclass(frozen=True, slots=True, repr=False)
class Turn:
    """One sampled turn, and the tokens that were appended after it. Its ``repr`` counts the tokens."""

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

    def __repr__(self) -> str:
        called = ""
        if self.call is not None:
            found = sum(map(len, self.call.results))
            called = f", malformed call: {self.call.problem}" if self.call.problem else f", {_many(found, 'passage')}"
        return f"<Turn {_cut(self.text)}, {_many(len(self.sampled_tokens), 'token')}{called}>"


@dataclass(frozen=True, repr=False)
class Episode:
    """One played episode. Its ``repr`` is one line; the tokens are in :attr:`tokens`.

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

    def __repr__(self) -> str:
        parts = [f"{self.question.id!r}: {_cut(self.question.question)}", _many(len(self.turns), "turn")]
        if self.calls:
            parts.append(_many(sum(map(len, (call.queries for call in self.calls))), "query", "queries"))
        parts.append(f"{len(self.tokens):,} tokens")
        parts.append(str(self.stop_reason.value) if self.answer is None else f"answer {_cut(self.answer)}")
        parts.append(f"reward {self.reward:g}" if self.error is None else f"error {_cut(self.error)}")
        return f"<Episode {', '.join(parts)}>"


@dataclass(frozen=True, repr=False)
class Group:
    """The finished episodes of one question: the unit over which advantages are centred. Its ``repr`` is one line."""

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

    def __repr__(self) -> str:
        parts = [f"{self.question.id!r}: {_cut(self.question.question)}", _many(len(self.episodes), "episode")]
        if self.episodes:
            parts.append(f"rewards {', '.join(f'{reward:g}' for reward in self.rewards[:16])}")
        if len(self.episodes) > 16:
            parts[-1] += ", …"
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        return f"<Group {', '.join(parts)}>"


def _cut(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_TEXT else f"{text[: _SHOWN_TEXT - 1]}…")


def _many(count: int, one: str, several: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"
