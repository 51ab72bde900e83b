"""Tokens as pieces of the text that they were decoded to, and how sure the model was of each.

An episode holds token ids and each turn's text, not what each token stands for. A tokenizer can say, and is believed only
where its pieces, put together, are the turn's text to the letter.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from searchr1_async.episodes.types import Episode

REMEMBERED = 4
"""Tokenizers of the process that a representation looks through, newest first."""

_UNFINISHED = "\ufffd"
_MAX_JOINED = 16
"""Tokens that may be needed for one piece of valid text; a character of emoji takes up to 4 bytes, a flag 8."""

LEVELS = (0.9, 0.5, 0.2, 0.05, 0.01)
"""Probabilities between the shades: a token of at least the first is certain (no colour), one below the last a surprise."""

_remembered: deque[Any] = deque(maxlen=REMEMBERED)
_newest: Any = None
_pieces: weakref.WeakKeyDictionary[Any, dict[int, str]] = weakref.WeakKeyDictionary()


def remember_tokenizer(tokenizer: Any) -> None:
    """From now on episodes that this tokenizer decoded show their tokens in colour.

    The newest is kept alive, since a notebook shows episodes after their service has closed; the few before it are shown
    with for as long as something else keeps them. One that cannot be referred to weakly is not remembered when another
    comes.
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
    """Those that are still alive, newest first."""
    alive = [tokenizer for known in reversed(_remembered) if (tokenizer := known()) is not None]
    others = [tokenizer for tokenizer in alive if tokenizer is not _newest]
    return others if _newest is None else [_newest, *others]


def forget_tokenizers() -> None:
    """For tests: as in a new process."""
    global _newest
    _newest = None
    _remembered.clear()


def token_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str] | None:
    """The text of each token, in a list as long as ``token_ids``; None where the tokenizer cannot decode them.

    Tokens that are valid UTF-8 only together have their text at the first of them, and ``""`` at the others. Whoever has
    the text that they should give compares: see :func:`turn_pieces`.
    """
    try:
        known = _pieces.setdefault(tokenizer, {})
    except TypeError:
        known = {}
    try:
        return _joined(tokenizer, token_ids, known)
    except Exception:  # an id that is none of this tokenizer's: each kind of tokenizer raises something else
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
        if _UNFINISHED in text:  # bytes that are no text: how many signs stand for them depends on all of them
            end = at + 1
            while end < len(token_ids) and _UNFINISHED in alone(token_ids[end]):
                end += 1
            text = tokenizer.decode(list(token_ids[at:end]))
        pieces.append(text)
        pieces.extend([""] * (end - at - 1))
        at = end
    return pieces


def turn_pieces(tokenizer: Any, token_ids: Sequence[int], text: str) -> list[str] | None:
    """:func:`token_pieces`, if together they are exactly ``text``; None otherwise, and without a tokenizer."""
    if tokenizer is None or not token_ids:
        return None
    pieces = token_pieces(tokenizer, token_ids)
    return pieces if pieces is not None and "".join(pieces) == text else None


def tokenizer_of(episode: Episode) -> Any:
    """The newest remembered tokenizer that gives the text of every turn of this episode; None if none does."""
    for tokenizer in remembered_tokenizers():
        if all(turn_pieces(tokenizer, turn.sampled_tokens, turn.text) is not None for turn in episode.turns):
            return tokenizer
    return None


def decoded(tokenizer: Any, token_ids: Sequence[int]) -> str | None:
    """The text of tokens that have none in the episode (prompt, search results); None where it cannot be had."""
    if tokenizer is None:
        return None
    pieces = token_pieces(tokenizer, token_ids)
    return None if pieces is None else "".join(pieces)


def joined_logprobs(pieces: Sequence[str], logprobs: Sequence[float]) -> list[tuple[str, float | None]]:
    """Pieces that have a text, each with the log probability of all its tokens; None where a sampler gave no number."""
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
    """The shade of a token: 0 for a certain one to ``len(LEVELS)`` for a surprise; None without a number."""
    return None if logprob is None else sum(logprob < bound for bound in LOG_LEVELS)


LOG_LEVELS = tuple(math.log(probability) for probability in LEVELS)
