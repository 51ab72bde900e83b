"""Parts of an episode as script-free HTML, for cells and reports. Pure.

Text of models, corpora and users must go through :mod:`searchr1_async.watch.viewer.markup`.

Text and log probability of each sampled token.

Episodes hold token ids and each turn's text, not the text of each token. A tokenizer's pieces are only used if they concatenate
exactly to the turn's text.

Segments of a turn's text: thoughts, tool calls, the answer, chat markup, and other text. Pure.
"""

from __future__ import annotations

import math
import re
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, Turn
from searchr1_async.watch.viewer.markup import (
    STOP_WORDS,
    highlighted,
    isolated,
    marked,
    reward_words,
    tokens,
    verdict,
    visible,
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


Kind = Literal["thought", "call", "answer", "markup", "said"]

_OPENING: dict[str, Kind] = {"think": "thought", "tool_call": "call", "search": "call", "answer": "answer"}
_TAG = re.compile(r"<(/?)(think|tool_call|search|answer)>|<\|[A-Za-z0-9_]{1,40}\|>")


def segments(text: str, content: str = "") -> list[tuple[Kind, int]]:
    """Kinds of a turn's segments with their lengths in characters, which add up to the text's length.

    Args:
        text: of the turn, markup included.
        content: the turn without chat markup and reasoning. If ``text`` has no thought tags, what precedes its content is the
            reasoning.

    Tags belong to their segment; an unclosed one extends to the end. A closing ``</think>`` without an opening one ends a thought
    that began in the prompt. Takes linear time.
    """
    out: list[tuple[Kind, int]] = []
    inside: Kind | None = None
    closing = ""
    start = 0
    has_thought = False

    def add(kind: Kind, end: int) -> None:
        nonlocal start
        if end > start:
            if out and out[-1][0] == kind:
                out[-1] = (kind, out[-1][1] + end - start)
            else:
                out.append((kind, end - start))
        start = end

    for match in _TAG.finditer(text):
        name = match[2]
        if inside is not None:
            if name == closing and match[1]:
                add(inside, match.end())
                inside = None
        elif name is None:
            add("said", match.start())
            add("markup", match.end())
        elif not match[1]:
            add("said", match.start())
            inside, closing = _OPENING[name], name
            has_thought |= inside == "thought"
        elif name == "think" and not has_thought:
            out.clear()
            start = 0
            add("thought", match.end())
            has_thought = True
    add(inside or "said", len(text))
    return out if has_thought or not content else _before(text, content, out)


def _before(text: str, content: str, found: list[tuple[Kind, int]]) -> list[tuple[Kind, int]]:
    """``found``, with the text before the turn's content as thought."""
    place = text.find(content)
    if place <= 0:
        return found
    out: list[tuple[Kind, int]] = []
    at = 0
    for kind, length in found:
        ahead = min(max(place - at, 0), length)
        said = text[at : at + ahead]
        if kind == "said" and said.strip():
            out.append(("thought", ahead))
            if length > ahead:
                out.append((kind, length - ahead))
        else:
            out.append((kind, length))
        at += length
    return out


T = TypeVar("T")


def overlaid(
    text: str, kinds: Iterable[tuple[Kind, int]], pieces: Iterable[tuple[str, T]], limit: int
) -> Iterator[tuple[Kind, list[tuple[str, T]]]]:
    """The first ``limit`` characters by kind, each segment split at piece boundaries. A piece that spans two kinds is in both."""
    queue = iter(pieces)
    piece, value = next(queue, ("", None))
    left = min(limit, len(text))
    for kind, length in kinds:
        length = min(length, left)
        left -= length
        inside: list[tuple[str, T]] = []
        while length > 0:
            if not piece:
                following = next(queue, None)
                if following is None:
                    break
                piece, value = following
                continue
            taken = piece[:length]
            inside.append((taken, value))  # type: ignore[arg-type]
            piece = piece[len(taken) :]
            length -= len(taken)
        if inside:
            yield kind, inside


MAX_TEXT = 20_000
"""Maximum characters shown of a turn, prompt or result."""

MAX_PASSAGE = 5_000
MAX_LINE = 2_000
"""Maximum for single-line texts: title, query, answer."""


SHADED = 'title="log-probability '
"""Marks a coloured token; cannot occur in text, whose quotes are escaped."""


def clipped(text: str, limit: int = MAX_TEXT) -> tuple[str, int]:
    """The first ``limit`` characters, and the number of omitted ones."""
    return text[:limit], max(len(text) - limit, 0)


def clipped_note(left_out: int) -> str:
    """A note on omitted characters; empty if there are none."""
    return f'<span class="more"> … {left_out:,} more characters</span>' if left_out else ""


def line_html(text: str, tag: str = "bdi", css: str = "") -> str:
    """A short text, isolated and clipped."""
    shown, left_out = clipped(text, MAX_LINE)
    return isolated(shown, tag, css) + clipped_note(left_out)


def said_html(text: str) -> str:
    """A text verbatim, in its own block."""
    shown, left_out = clipped(text)
    return isolated(shown, "pre", "said") + clipped_note(left_out)


def turn_html(
    number: int, turn: Turn, question: Question, *, tokenizer: Any = None, with_kinds: bool = True, between: str = ""
) -> str:
    """One turn: heading, text (with token colours if known), search.

    Args:
        number: from 1.
        turn: the turn.
        question: its golden answers are highlighted in passages.
        tokenizer: for token colours; None omits them.
        with_kinds: style thoughts, calls and the answer differently.
        between: HTML between text and search.
    """
    cut = ' · <span class="problem">cut at the token limit</span>' if turn.truncated else ""
    text = coloured_html(turn, tokenizer) if with_kinds else said_html(turn.text)
    head = f"turn {number} · {tokens(len(turn.sampled_tokens))}"
    if with_kinds:
        head += f" · weights after step {turn.policy_version} · {turn.seconds:.1f} s"
    return f'<div class="turn"><div class="head soft">{head}{cut}</div>{text}{call_html(turn.call, question)}{between}</div>'


_LABELS: dict[Kind, str] = {"thought": "thought", "call": "tool call", "answer": "answer"}


def coloured_html(turn: Turn, tokenizer: Any) -> str:
    """A turn's text by kind; tokens are shaded by log probability, which their title gives."""
    kinds = segments(turn.text, turn.content)
    pieces = turn_pieces(tokenizer, turn.sampled_tokens, turn.text)
    if pieces is None or len(turn.logprobs) != len(pieces):
        coloured: Sequence[tuple[str, float | None]] = [(turn.text, None)]
    else:
        coloured = joined_logprobs(pieces, turn.logprobs)
    body = "".join(
        f'<span class="stretch {kind}">{_label(kind)}{"".join(_token(text, logprob) for text, logprob in inside)}</span>'
        for kind, inside in overlaid(turn.text, kinds, coloured, MAX_TEXT)
    )
    return f'<pre class="said" dir="auto">{body}</pre>{clipped_note(max(len(turn.text) - MAX_TEXT, 0))}'


def _label(kind: Kind) -> str:
    return f'<span class="tag">{_LABELS[kind]}</span>' if kind in _LABELS else ""


def _token(text: str, logprob: float | None) -> str:
    shade = level(logprob)
    if shade is None:
        return visible(text)
    return f'<span class="t{shade}" {SHADED}{logprob:.3f}">{visible(text)}</span>'


def legend_html() -> str:
    """Legend of the token shades, from likely to unlikely."""
    bounds = [1.0, *LEVELS, 0.0]
    shades = "".join(
        f'<span class="t{shade}">{f"≥ {bounds[shade + 1]:.0%}" if bounds[shade + 1] else f"< {bounds[shade]:.0%}"}</span>'
        for shade in range(len(LEVELS) + 1)
    )
    return f'<div class="legend">token probability at sampling: likely {shades} unlikely</div>'


def call_html(call: SearchCall | None, question: Question) -> str:
    """A tool call and its result; empty without a call. Passages are expanded if the question has no golden answer, as they are
    then the only evidence."""
    if call is None:
        return ""
    if call.problem is not None:
        return f'<div class="problem">malformed call: {line_html(call.problem)}</div>'
    if not call.results:
        queries = ", ".join(line_html(query) for query in call.queries)
        return f'<div class="soft">queries: {queries}; the search was not run</div>'
    is_open = "" if question.golden_answers else " open"
    return "".join(
        f'<details class="search"{is_open}><summary>search: {line_html(query)} ({_count(found)}, {call.seconds:.2f} s)</summary>'
        + "".join(passage_html(passage, question) for passage in found)
        + "</details>"
        for query, found in zip(call.queries, call.results, strict=False)
    )


def given_html(episode: Episode) -> str:
    """Passages placed in the prompt with the question; empty if there are none."""
    if episode.given is None:
        return ""
    problem = episode.given.problem
    found = (
        call_html(episode.given, episode.question)
        if problem is None
        else f'<div class="problem">none: {line_html(problem)}</div>'
    )
    return f'<div class="turn"><div class="head soft">given with the question</div>{found}</div>'


def _count(found: Sequence[Passage]) -> str:
    return f"{len(found)} passage{'' if len(found) == 1 else 's'}"


def passage_html(passage: Passage, question: Question) -> str:
    """A passage with title and score; golden answers are highlighted."""
    text, left_out = clipped(passage.text, MAX_PASSAGE)
    return (
        f'<div class="passage" dir="auto"><strong>{line_html(passage.title)}</strong> '
        f'<span class="soft">{passage.score:.3f}</span><br>{highlighted(text, question.golden_answers)}'
        f"{clipped_note(left_out)}</div>"
    )


def verdict_html(episode: Episode) -> str:
    """The answer with its verdict, the reward and its parts, the stop reason, and any error."""
    css = f" {verdict(episode)}" if episode.question.golden_answers else ""
    answer = "no answer" if episode.answer is None else f"answer: {line_html(episode.answer)}"
    reward = visible(reward_words(episode))
    stop = STOP_WORDS[episode.stop_reason]
    error = f'<div class="problem">{line_html(episode.error)}</div>' if episode.error else ""
    return (
        f'<div><span class="verdict{css}">{marked(episode, answer)}</span>'
        f'<div class="facts soft">{reward} · stopped ({episode.stop_reason.value}): {stop}</div>{error}</div>'
    )


def golden_html(question: Question) -> str:
    """The accepted golden answers."""
    shown = " or ".join(line_html(answer) for answer in question.golden_answers[:20])
    more = len(question.golden_answers) - 20
    return shown + (f" or {more} more" if more > 0 else "")
