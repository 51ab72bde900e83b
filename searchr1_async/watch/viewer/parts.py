"""Parts of an episode as data: the text and log probability of each token, and packed chunks for the page's script.

A tokenizer's pieces are only used if they concatenate exactly to the turn's text. The page's data are a small index over all
episodes and chunks that are unpacked on demand: JSON, gzipped, in base64, so no episode text appears in the page's markup. Lengths
are in UTF-16 code units, as in JavaScript.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from searchr1_async.episodes.table import EpisodeRow
from searchr1_async.episodes.types import Episode, Passage, SearchCall, StopReason, Turn
from searchr1_async.watch.viewer.markup import (
    MARKS,
    MAX_LINE,
    MAX_PASSAGE,
    MAX_TEXT,
    STOP_WORDS,
    TOO_LONG,
    learning_words,
    reward_words,
    segments,
    source_words,
    suspect_table,
    verdict,
)

REMEMBERED = 4
"""Number of recent tokenizers tried for display."""

_UNFINISHED = "\ufffd"
_MAX_JOINED = 16
"""Maximum tokens joined into one piece of valid text; an emoji takes up to 4 bytes, a flag 8."""

LEVELS = (0.9, 0.5, 0.2, 0.05, 0.01)
"""Probability thresholds between shades: from the first on a token is uncoloured, below the last it is the most intense."""

_remembered: deque[Any] = deque(maxlen=REMEMBERED)
_newest: Any = None
_pieces: weakref.WeakKeyDictionary[Any, dict[int, str]] = weakref.WeakKeyDictionary()


def remember_tokenizer(tokenizer: Any) -> None:
    """Colour the tokens of episodes that this tokenizer decoded from now on.

    The newest tokenizer is kept alive, because notebooks show episodes after their service has closed; older ones are referenced
    weakly.
    """
    global _newest
    _newest = tokenizer
    try:
        reference = weakref.ref(tokenizer)
    except TypeError:
        return
    if all(known() is not tokenizer for known in _remembered):
        _remembered.append(reference)


def remembered_tokenizers() -> list[Any]:
    """Live tokenizers, newest first."""
    alive = [tokenizer for known in reversed(_remembered) if (tokenizer := known()) is not None]
    others = [tokenizer for tokenizer in alive if tokenizer is not _newest]
    return others if _newest is None else [_newest, *others]


def forget_tokenizers() -> None:
    """Reset, for tests."""
    global _newest
    _newest = None
    _remembered.clear()


def token_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str] | None:
    """The text of each token, as long as ``token_ids``; None if the tokenizer cannot decode them.

    Tokens that are valid UTF-8 only together have their text at the first of them, and ``""`` at the others. Compare with the
    expected text: see :func:`turn_pieces`.
    """
    try:
        known = _pieces.setdefault(tokenizer, {})
    except TypeError:
        known = {}
    try:
        return _joined(tokenizer, token_ids, known)
    except Exception:  # unknown ids: tokenizers raise different errors
        return None


def _joined(tokenizer: Any, token_ids: Sequence[int], known: dict[int, str]) -> list[str]:
    def alone(token: int) -> str:
        text = known.get(token)
        if text is None:
            text = known[token] = tokenizer.decode([token])
        return text

    pieces: list[str] = []
    at = 0
    while at < len(token_ids):
        text, end = alone(token_ids[at]), at + 1
        longest = min(len(token_ids), at + _MAX_JOINED)
        while _UNFINISHED in text and end < longest:
            end += 1
            text = tokenizer.decode(list(token_ids[at:end]))
        if _UNFINISHED in text:  # invalid UTF-8: the number of replacement characters depends on the whole run of bytes
            end = at + 1
            while end < len(token_ids) and _UNFINISHED in alone(token_ids[end]):
                end += 1
            text = tokenizer.decode(list(token_ids[at:end]))
        pieces.append(text)
        pieces.extend([""] * (end - at - 1))
        at = end
    return pieces


def turn_pieces(tokenizer: Any, token_ids: Sequence[int], text: str) -> list[str] | None:
    """:func:`token_pieces` if they concatenate to ``text``; otherwise, and without a tokenizer, None."""
    if tokenizer is None or not token_ids:
        return None
    pieces = token_pieces(tokenizer, token_ids)
    return pieces if pieces is not None and "".join(pieces) == text else None


def tokenizer_of(episode: Episode) -> Any:
    """The newest remembered tokenizer that matches every turn of the episode; None if none does."""
    for tokenizer in remembered_tokenizers():
        if all(turn_pieces(tokenizer, turn.sampled_tokens, turn.text) is not None for turn in episode.turns):
            return tokenizer
    return None


def decoded(tokenizer: Any, token_ids: Sequence[int]) -> str | None:
    """The decoded text of prompt or search-result tokens; None if unavailable."""
    if tokenizer is None:
        return None
    pieces = token_pieces(tokenizer, token_ids)
    return None if pieces is None else "".join(pieces)


def joined_logprobs(pieces: Sequence[str], logprobs: Sequence[float]) -> list[tuple[str, float | None]]:
    """Non-empty pieces, each with the summed log probability of its tokens; None if one is not finite."""
    out: list[tuple[str, float | None]] = []
    for piece, logprob in zip(pieces, logprobs, strict=True):
        value = float(logprob) if math.isfinite(logprob) else None
        if piece or not out:
            out.append((piece, value))
        else:
            before = out[-1][1]
            out[-1] = (out[-1][0], None if before is None or value is None else before + value)
    return out


def level(logprob: float | None) -> int | None:
    """Shade of a token, from 0 (likely) to ``len(LEVELS)`` (unlikely); None without a log probability."""
    return None if logprob is None else sum(logprob < bound for bound in LOG_LEVELS)


LOG_LEVELS = tuple(math.log(probability) for probability in LEVELS)


CHUNK = 50
"""Episodes per chunk: about 150 kB, unpacked within milliseconds."""

FLAGS: dict[str, str] = {
    "right": "right",
    "wrong": "wrong",
    "nosearch": "no search",
    "toolong": "too long",
    "failed": "failed",
    "malformed": "malformed",
    "dropped": "not trained on",
}
"""Filters of the list, name to label; the position is the bit in the flags."""

MAX_LISTED = 300
"""Maximum characters of an answer or a question id in the index; chunks have the full text."""


def blocks(rows: Iterable[EpisodeRow], tokenizer: Any, about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The page's data blocks, as name and content: ``chunk-0``, ``chunk-1``, …, then ``index``.

    Args:
        rows: consumed one by one, never all in memory.
        tokenizer: for token pieces; None omits them.
        about: ``title`` and ``notes`` of the page.
    """
    index = _Index()
    strings = _Strings()
    packed: list[dict[str, Any]] = []
    number = 0
    prompt_text = lru_cache(maxsize=256)(lambda token_ids: decoded(tokenizer, token_ids))
    for row in rows:
        index.add(row)
        packed.append(_episode(row, tokenizer, prompt_text, strings))
        if len(packed) == CHUNK:
            yield f"chunk-{number}", compressed({"strings": strings.values, "episodes": packed})
            strings, packed, number = _Strings(), [], number + 1
    if packed:
        yield f"chunk-{number}", compressed({"strings": strings.values, "episodes": packed})
    yield "index", compressed({**about, **index.value(), **_rules()})


def compressed(value: Any) -> str:
    """JSON, gzipped, in base64. Deterministic."""
    # ASCII: lone surrogates, invalid in UTF-8, become escapes that JavaScript can read.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode("ascii")


def _rules() -> dict[str, Any]:
    """Constants shared with the script, so that they are defined once."""
    return {
        "chunk": CHUNK,
        "flags": FLAGS,
        "marks": MARKS,
        "stops": {reason.value: words for reason, words in STOP_WORDS.items()},
        "levels": LEVELS,
        "logLevels": LOG_LEVELS,
        "suspects": suspect_table(),
        "limits": {"text": MAX_TEXT, "passage": MAX_PASSAGE, "line": MAX_LINE},
    }


class _Index:
    """Columns of small values, one row per episode."""

    def __init__(self) -> None:
        self._sources: dict[tuple[int | None, str | None], int] = {}
        self._suites: dict[str, int] = {}
        self._questions: dict[tuple[str, str, str], int] = {}
        self._asked: list[list[Any]] = []
        names = (
            "question",
            "source",
            "answer",
            "verdict",
            "flags",
            "reward",
            "advantage",
            "turns",
            "tokens",
            "seconds",
            "member",
        )
        self._columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(self, row: EpisodeRow) -> None:
        episode, question = row.episode, row.episode.question
        suite = self._suites.setdefault(question.data_source, len(self._suites))
        text = question.question[:MAX_LINE]
        key = question.data_source, question.id, question.question
        asked = self._questions.setdefault(key, len(self._questions))
        if asked == len(self._asked):
            self._asked.append([question.id[:MAX_LISTED], suite, text])
        source = self._sources.setdefault((row.step, row.label), len(self._sources))
        values = {
            "question": asked,
            "source": source,
            "answer": None if episode.answer is None else episode.answer[:MAX_LISTED],
            "verdict": verdict(episode),
            "flags": _flags(row),
            "reward": _number(episode.reward) if episode.is_complete else None,
            "advantage": _number(row.advantage),
            "turns": len(episode.turns),
            "tokens": len(episode.prompt_tokens)
            + sum(len(turn.sampled_tokens) + len(turn.appended_tokens) for turn in episode.turns),
            "seconds": _number(episode.seconds, 2),
            "member": row.member,
        }
        for name, value in values.items():
            self._columns[name].append(value)

    def value(self) -> dict[str, Any]:
        return {
            "sources": [
                {"name": source_words(step, label), "label": label, "isEvaluation": label is not None}
                for step, label in self._sources
            ],
            "suites": list(self._suites),
            "questions": self._asked,
            "columns": self._columns,
        }


def _flags(row: EpisodeRow) -> int:
    episode = row.episode
    found = {
        "right": verdict(episode) == "right",
        "wrong": verdict(episode) == "wrong",
        "nosearch": not any(call is not None and call.results for call in (episode.given, *episode.calls)),
        "toolong": episode.stop_reason in TOO_LONG,
        "failed": not episode.is_complete,
        "malformed": episode.stop_reason is StopReason.MALFORMED_CALL
        or any(call.problem is not None for call in episode.calls),
        "dropped": row.trained is False and row.label is None,
    }
    return sum(1 << place for place, name in enumerate(FLAGS) if found[name])


class _Strings:
    """A chunk's texts, deduplicated: members of a group find mostly the same passages."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self._places: dict[str, int] = {}

    def add(self, text: str) -> int:
        place = self._places.setdefault(text, len(self.values))
        if place == len(self.values):
            self.values.append(text)
        return place


def _episode(row: EpisodeRow, tokenizer: Any, prompt_text: Any, strings: _Strings) -> dict[str, Any]:
    episode, question = row.episode, row.episode.question
    is_evaluation = row.label is not None
    return {
        "question": strings.add(question.question),
        "golden": [strings.add(answer) for answer in question.golden_answers],
        "answer": None if episode.answer is None else strings.add(episode.answer),
        "rewardWords": strings.add(reward_words(episode)),
        "stop": episode.stop_reason.value,
        "error": None if episode.error is None else strings.add(episode.error),
        "learning": strings.add(
            learning_words(episode, row.advantage, row.trained, row.drop_reason, is_evaluation=is_evaluation)
        ),
        "learned": None if is_evaluation else row.trained,
        "given": _call(episode.given, strings),
        "prompt": _masked(episode.prompt_tokens, prompt_text, strings),
        "turns": [_turn(turn, tokenizer, prompt_text, strings) for turn in episode.turns],
        "wrote": episode.action_token_count,
    }


def _turn(turn: Turn, tokenizer: Any, prompt_text: Any, strings: _Strings) -> dict[str, Any]:
    pieces = turn_pieces(tokenizer, turn.sampled_tokens, turn.text)
    tokens = None
    if pieces is not None and len(turn.logprobs) == len(pieces):
        # Only for the visible part, which bounds the size for huge turns.
        tokens = [[], []]
        shown = 0
        for piece, logprob in joined_logprobs(pieces, turn.logprobs):
            if shown >= MAX_TEXT:
                break
            tokens[0].append(_length(piece))
            tokens[1].append(None if logprob is None else round(-1000 * logprob))
            shown += tokens[0][-1]
    at = 0
    kinds: list[list[Any]] = []
    for kind, length in segments(turn.text, turn.content):
        kinds.append([kind, _length(turn.text[at : at + length])])
        at += length
    return {
        "text": strings.add(turn.text),
        "kinds": kinds,
        "tokens": tokens,
        "count": len(turn.sampled_tokens),
        "version": turn.policy_version,
        "seconds": _number(turn.seconds, 2),
        "truncated": turn.truncated,
        "call": _call(turn.call, strings),
        "appended": _masked(turn.appended_tokens, prompt_text, strings),
    }


def _call(call: SearchCall | None, strings: _Strings) -> dict[str, Any] | None:
    if call is None:
        return None
    return {
        "queries": [strings.add(query) for query in call.queries],
        "results": [[_passage(passage, strings) for passage in found] for found in call.results],
        "problem": None if call.problem is None else strings.add(call.problem),
        "seconds": _number(call.seconds, 2),
    }


def _passage(passage: Passage, strings: _Strings) -> list[Any]:
    return [strings.add(passage.title), strings.add(passage.text), _number(passage.score, 4)]


def _masked(token_ids: tuple[int, ...], text_of: Any, strings: _Strings) -> list[Any] | None:
    """Number of tokens read, and their text if known."""
    if not token_ids:
        return None
    text = text_of(token_ids)
    return [len(token_ids), None if text is None else strings.add(text)]


def _length(text: str) -> int:
    return len(text) if text.isascii() else len(text) + sum(char > "\uffff" for char in text)


def _number(value: float | None, digits: int = 6) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)
