"""Data types: questions, passages, turns, episodes and groups. All are frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from numbers import Integral
from typing import Any, Literal

from searchr1_async.boundary.settings import lone_surrogate, shown, shown_with_kind
from searchr1_async.boundary.tables import is_missing
from searchr1_async.errors import CorpusError, QuestionsError

_SHOWN_TEXT = 80
"""Maximum characters of a text in a ``repr``."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its golden answers.

    An integer ``id`` becomes a string, a list of golden answers a tuple, and a single string the only golden answer.

    Raises:
        QuestionsError: the question is blank, all given golden answers are blank, or a field has the wrong type.
    """

    id: str
    """Unique within its suite; resume points refer to questions by it."""
    question: str
    golden_answers: tuple[str, ...] = ()
    """Any of them is correct. Empty if unknown: such a question can be asked (:func:`searchr1_async.ask`), but not trained or
    evaluated on."""
    data_source: str = "unknown"
    """Suite of the question; metrics are grouped by it (``env/<data_source>/…``)."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of its row (``hop``, ``country``, …)."""

    def __post_init__(self) -> None:
        _set_id(self, "question", QuestionsError)
        answers: Any = self.golden_answers
        if not isinstance(answers, tuple):
            if type(answers).__module__ == "numpy":  # a cell of a pandas frame
                answers = answers.tolist()
            answers = (answers,) if isinstance(answers, str) else answers
            object.__setattr__(self, "golden_answers", tuple(answers) if isinstance(answers, list) else answers)
        for name, kind, wanted in _QUESTION_FIELDS:
            if not isinstance(found := getattr(self, name), kind):
                raise QuestionsError(f"{self._name} has a {name} that is {shown_with_kind(found)}: give {wanted}")
        if not self.question.strip():
            raise QuestionsError(f"{self._name} has no text")
        for place, answer in enumerate(self.golden_answers, start=1):
            if not isinstance(answer, str):
                raise QuestionsError(
                    f"{self._name} has a golden answer that is not a string: number {place} is {shown_with_kind(answer)}"
                )
        if self.golden_answers:
            self._check_answers()

    def check_scorable(self) -> None:
        """Checks that the question can be scored and stored.

        Raises:
            QuestionsError: every golden answer is blank, or a text contains a lone surrogate.
        """
        self._check_answers()
        for text in (self.id, self.question, self.data_source, *self.golden_answers):
            if not text.isascii() and lone_surrogate(text) is not None:
                raise QuestionsError(f"{self._name} contains a lone surrogate in {shown(text)}: read its file as UTF-8")

    def _check_answers(self) -> None:
        if not any(map(str.strip, self.golden_answers)):
            raise QuestionsError(f"{self._name} has no golden answer: give at least one, or leave the row out")

    @property
    def _name(self) -> str:
        return f"question {self.id!r} of {self.data_source!r}"


# dict first, since the check of the abstract class is slow
_QUESTION_FIELDS: tuple[tuple[str, Any, str], ...] = (
    ("question", str, "a string"),
    ("data_source", str, "a string"),
    ("golden_answers", tuple, "a tuple of strings, such as ('Paris',)"),
    ("metadata", (dict, Mapping), "a dict"),
)


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage of the corpus.

    An integer ``id`` becomes a string, and a missing title (None, NaN) "".

    Raises:
        CorpusError: a field has the wrong type.
    """

    id: str
    title: str
    text: str
    score: float = 0.0
    """Similarity, higher is closer (for cosine distance ``1 - distance``)."""

    def __post_init__(self) -> None:
        if isinstance(self.id, str) and isinstance(self.title, str) and isinstance(self.text, str):
            return
        _set_id(self, "passage", CorpusError)
        if is_missing(self.title):
            object.__setattr__(self, "title", "")
        for name in ("title", "text"):
            if not isinstance(found := getattr(self, name), str):
                raise CorpusError(f"passage {self.id!r} has a {name} that is {shown_with_kind(found)}: give a string")


def _set_id(value: Question | Passage, what: str, error: type[QuestionsError | CorpusError]) -> None:
    """Makes an integer id a string."""
    given: Any = value.id
    if isinstance(given, str):
        return
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise error(f"a {what} has the id {shown_with_kind(given)}: give a string or an integer")
    object.__setattr__(value, "id", str(int(given)))


class StopReason(StrEnum):
    """Why an episode ended. Metrics count each as a fraction of *all* episodes (``env/all/stop/<value>``)."""

    ANSWER = "answer"
    """The model answered."""
    NO_ANSWER = "no_answer"
    """The model ended its turn without a call or an answer."""
    MALFORMED_CALL = "malformed_call"
    """The model's tool call could not be parsed."""
    MAX_TURNS = "max_turns"
    """The model called the search in its last allowed turn; the search is not run."""
    MAX_TURN_TOKENS = "max_turn_tokens"
    """A turn was cut at ``max_tokens``."""
    MAX_TRAJECTORY_TOKENS = "max_trajectory_tokens"
    """The next turn might exceed ``max_trajectory_tokens``."""
    NOT_EXTENDABLE = "not_extendable"
    """The chat format cannot continue the sampled tokens without changing them."""
    TIME_LIMIT = "time_limit"
    """The episode exceeded its time limit; never trained on, since the service may have been slow."""
    FAILED = "failed"
    """A service failed permanently; never trained on."""


@dataclass(frozen=True, slots=True)
class SearchCall:
    """A tool call by the model, with its results."""

    queries: tuple[str, ...]
    """Empty if the call was malformed."""
    results: tuple[tuple[Passage, ...], ...] = ()
    """Passages per query; empty if the search was not run (last turn, malformed call)."""
    problem: str | None = None
    """Why the call was malformed; None if valid."""
    seconds: float = 0.0
    """Duration of the search."""


@dataclass(frozen=True, slots=True, repr=False)
class Turn:
    """One sampled turn and the tokens appended after it. Its ``repr`` shows token counts."""

    sampled_tokens: tuple[int, ...]
    """As sampled, including the stop token; never re-encoded."""
    logprobs: tuple[float, ...]
    """Natural-log probabilities of ``sampled_tokens`` under the policy that sampled them; same length."""
    text: str = ""
    """``sampled_tokens`` decoded."""
    content: str = ""
    """``text`` without chat markup and reasoning."""
    policy_version: int = 0
    """Optimizer steps before the weights of this turn; with in-flight weights these may be newer."""
    call: SearchCall | None = None
    appended_tokens: tuple[int, ...] = ()
    """Tokens between this turn and the next: the turn's end, the tool result, the next header."""
    seconds: float = 0.0
    """Duration of the sampling request."""
    truncated: bool = False
    """Sampling stopped at the length limit."""
    sequence_id: str | None = None
    """The service's id of ``sampled_tokens``, valid within the session; None if it gave none. Also identifies the turn's prompt
    (see :func:`searchr1_async.training.batches.to_datum`)."""
    cached_prompt_tokens: int = 0
    """Prompt tokens billed as cache hits. For a shared first turn, one prompt is billed as the service reports, the other members'
    as fully cached."""

    def __repr__(self) -> str:
        found = "" if self.call is None else f", {sum(map(len, self.call.results))} passages"
        return f"<Turn {_cut(self.text)}, {len(self.sampled_tokens):,} tokens{found}>"


@dataclass(frozen=True, repr=False)
class Episode:
    """One episode. Its ``repr`` is one line; the tokens are in :attr:`tokens`.

    The token sequence is ``prompt_tokens + turn 1 sampled + turn 1 appended + turn 2 sampled + …``: the prompt of turn n + 1 is
    exactly everything before its sampled tokens, so an episode gives one training example.
    """

    question: Question
    prompt_tokens: tuple[int, ...]
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    answer: str | None = None
    """Answer parsed from the last turn, or None."""
    reward: float = 0.0
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """``correct``, ``format``, ``f1``, …: each becomes a metric ``env/all/<name>``."""
    error: str | None = None
    """The cause if ``stop_reason`` is FAILED."""
    seconds: float = 0.0
    given: SearchCall | None = None
    """A search run before the model's first turn, with its passages in the prompt; see
    :data:`~searchr1_async.episodes.prompts.Method`. Not one of the model's calls."""

    @property
    def failed(self) -> bool:
        """A service failed."""
        return self.stop_reason is StopReason.FAILED

    @property
    def is_complete(self) -> bool:
        """Ended by the model rather than a failure or time limit; only complete episodes are scored and trained on."""
        return self.stop_reason not in (StopReason.FAILED, StopReason.TIME_LIMIT)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The full sequence up to the last sampled token."""
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
        """Tokens the model read but did not sample: prompt and appended tokens."""
        return len(self.prompt_tokens) + sum(len(turn.appended_tokens) for turn in self.turns)

    @property
    def token_count(self) -> int:
        """Length of :attr:`tokens`, which are not made for it: once made they stay as long as the episode."""
        return self.observation_token_count + self.action_token_count

    @property
    def calls(self) -> tuple[SearchCall, ...]:
        return tuple(turn.call for turn in self.turns if turn.call is not None)

    @property
    def transcript(self) -> str:
        """The episode as plain text: question, each turn, each search's passages, answer."""
        lines = [f"[question] {self.question.question}"]
        if self.given is not None:
            lines += ["[given with the question]", *_call_lines(self.given, "nothing")]
        for number, turn in enumerate(self.turns, start=1):
            lines.append(f"[turn {number}] {turn.text}")
            if turn.call is not None:
                lines += _call_lines(turn.call, "malformed call")
        lines.append(f"[{self.stop_reason.value}] {self.answer or ''}".rstrip())
        lines.append(f"[golden] {' | '.join(self.question.golden_answers)}")
        if self.error:
            lines.append(f"[error] {self.error}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        end = str(self.stop_reason.value) if self.answer is None else f"answer {_cut(self.answer)}"
        worth = f"reward {self.reward:g}" if self.error is None else f"error {_cut(self.error)}"
        asked = f"{self.question.id!r}: {_cut(self.question.question)}"
        return f"<Episode {asked}, {len(self.turns)} turns, {self.token_count:,} tokens, {end}, {worth}>"


def _call_lines(call: SearchCall, problem: str) -> list[str]:
    lines = [] if call.problem is None else [f"[{problem}] {call.problem}"]
    for query, found in zip(call.queries, call.results, strict=False):
        lines.append(f"[search] {query}")
        lines.extend(f"[passage] {passage.title}: {passage.text}" for passage in found)
    return lines


@dataclass(frozen=True, repr=False)
class Group:
    """The finished episodes of one question, within which advantages are computed. Its ``repr`` is one line."""

    question: Question
    episodes: tuple[Episode, ...]
    """Complete episodes only."""
    failed: tuple[Episode, ...] = ()
    """Episodes that failed or exceeded their time limit."""

    @cached_property
    def rewards(self) -> tuple[float, ...]:
        return tuple(episode.reward for episode in self.episodes)

    @property
    def is_constant(self) -> bool:
        """All rewards are equal, so every advantage is 0."""
        return len(self.episodes) < 2 or max(self.rewards) - min(self.rewards) < 1e-9

    @property
    def policy_versions(self) -> tuple[int, ...]:
        return tuple(sorted({turn.policy_version for episode in self.episodes for turn in episode.turns}))

    def __repr__(self) -> str:
        rewards = ", ".join(f"{reward:g}" for reward in self.rewards[:16]) + (", …" if len(self.episodes) > 16 else "")
        asked = f"{self.question.id!r}: {_cut(self.question.question)}"
        return f"<Group {asked}, {len(self.episodes)} episodes, rewards {rewards}, {len(self.failed)} failed>"


DropReason = Literal["constant_reward", "too_few_episodes", "too_slow", "step_time_limit"]
"""Why a group is not trained on: its rewards are all equal; too few of its episodes finished; its step closed without it; its step's
time was over."""


@dataclass(frozen=True, slots=True)
class GroupOutcome:
    """A group and whether it was trained on."""

    place: int
    """Index of the group in the run; place p is question p mod N of epoch p div N."""
    group: Group
    """May have no episodes if it was cancelled as too slow."""
    drop_reason: DropReason | None = None
    """None: trained on."""


def _cut(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_TEXT else f"{text[: _SHOWN_TEXT - 1]}…")


_token_ids: dict[int, int] = {}
"""Every token id that was seen: a vocabulary at most."""


def shared_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    """The same tokens, equal ids as one object: each would take 28 bytes, and an episode has several hundred."""
    ids = [*map(int, tokens)]  # not numpy's, which are equal and would be kept for every later episode
    return tuple(map(_token_ids.setdefault, ids, ids))
