"""Text and log probability of each sampled token.

Episodes hold token ids and each turn's text, not the text of each token. A tokenizer's pieces are only used if they concatenate
exactly to the turn's text.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from searchr1_async.episodes.types import Episode

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
