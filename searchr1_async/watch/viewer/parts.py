"""Parts of an episode as script-free HTML, for cells and reports. Pure.

Text of models, corpora and users must go through :mod:`searchr1_async.watch.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, Turn
from searchr1_async.watch.html import highlighted, isolated, visible
from searchr1_async.watch.viewer.segments import Kind, overlaid, segments
from searchr1_async.watch.viewer.tokens import LEVELS, joined_logprobs, level, turn_pieces
from searchr1_async.watch.viewer.words import STOP_WORDS, marked, reward_words, tokens, verdict

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
