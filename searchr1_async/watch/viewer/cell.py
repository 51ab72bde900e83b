"""Episodes and groups in a notebook cell (HTML with own styles and no script) and in a terminal (plain text). Pure.

Text of models, corpora and users goes through :mod:`searchr1_async.watch.viewer.markup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from searchr1_async.episodes.table import centred
from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, Turn
from searchr1_async.watch.viewer.markup import (
    MARKS,
    MAX_LINE,
    MAX_PASSAGE,
    MAX_TEXT,
    STOP_WORDS,
    Kind,
    cell_style,
    counted,
    highlighted,
    isolated,
    learning_words,
    marked,
    overlaid,
    reward_words,
    segments,
    tokens,
    verdict,
    visible,
    visible_text,
)
from searchr1_async.watch.viewer.parts import LEVELS, decoded, joined_logprobs, level, tokenizer_of, turn_pieces

SHADED = 'title="log-probability '
"""Marks a coloured token; cannot occur in text, whose quotes are escaped."""


def episode_html(
    episode: Episode,
    *,
    tokenizer: Any = None,
    advantage: float | None = None,
    trained: bool | None = None,
    drop_reason: str | None = None,
) -> str:
    """An episode as HTML for a cell.

    Args:
        episode: untrusted texts are escaped, isolated and clipped at about 20,000 characters.
        tokenizer: the model's, for token colours and masked text; None uses one given to
            :func:`~searchr1_async.watch.viewer.remember_tokenizer` that matches the turns' texts.
        advantage: reward minus the group mean; None if unknown.
        trained: whether it was trained on; None if unknown.
        drop_reason: why it was not trained on (``constant_reward``, …).
    """
    body = _asked(episode) + _episode(episode, tokenizer, advantage, trained, drop_reason)
    return _framed(body)


def group_html(
    group: Group, *, tokenizer: Any = None, trained: bool | None = None, drop_reason: str | None = None
) -> str:
    """A group as HTML for a cell: a table of its members with reward and advantage, each expandable.

    Args: as for :func:`episode_html`.
    """
    members = [*group.episodes, *group.failed]
    mean = sum(group.rewards) / len(group.rewards) if group.rewards else 0.0
    advantages = centred(group.rewards)
    rows: list[str] = []
    bodies: list[str] = []
    for number, episode in enumerate(members, start=1):
        is_finished = number <= len(group.episodes)
        advantage = advantages[number - 1] if is_finished else None
        reason = drop_reason if is_finished else "failed"
        rows.append(_member_row(number, episode, advantage))
        body = _episode(episode, tokenizer, advantage, trained if is_finished else False, reason)
        answer = "no answer" if episode.answer is None else line_html(episode.answer)
        bodies.append(
            f'<details class="member more-of"><summary><span class="{verdict(episode)}">{MARKS[verdict(episode)]}</span> '
            f"episode {number}: {answer}</summary>{body}</details>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("", "reward", "advantage", "turns", "tokens", "seconds", "answer"))
    lesson = (
        '<div class="learning dropped">All rewards are equal: there is nothing to learn from.</div>'
        if group.is_constant and members
        else ""
    )
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    title = f'<div class="facts">group of {counted(len(members), "episode")} · mean reward {mean:.3g}</div>'
    return _framed((_asked(members[0]) if members else "") + title + lesson + table + "".join(bodies))


def _framed(body: str) -> str:
    return f'<div class="searchr1-episode"><style>{cell_style()}</style>{body}</div>'


def _asked(episode: Episode) -> str:
    question = episode.question
    text = line_html(question.question, "div", "question-text")
    if not question.golden_answers:
        return text
    return (
        f'{text}<div class="facts">golden answer: {golden_html(question)} · {line_html(question.data_source)} · '
        f"{line_html(question.id)}</div>"
    )


def _episode(
    episode: Episode, tokenizer: Any, advantage: float | None, trained: bool | None, drop_reason: str | None
) -> str:
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(episode)
    learning = learning_words(episode, advantage, trained, drop_reason)
    css = {True: " trained", False: " dropped", None: ""}[trained]
    facts = f"{counted(len(episode.turns), 'turn')} · {tokens(len(episode.tokens))} · {episode.seconds:.1f} s"
    turns = "".join(
        turn_html(number, turn, episode.question, tokenizer=tokenizer, between=_masked(turn.appended_tokens, tokenizer))
        for number, turn in enumerate(episode.turns, start=1)
    )
    prompt = _masked(episode.prompt_tokens, tokenizer, "prompt")
    legend = legend_html() if SHADED in turns else ""
    return (
        f'{verdict_html(episode)}<div class="facts">{facts}</div><div class="learning{css}">{visible(learning)}</div>'
        f'<details class="more-of"{" open" if len(episode.turns) <= 3 else ""}>'
        f"<summary>{counted(len(episode.turns), 'turn')}</summary>{legend}{given_html(episode)}{prompt}{turns}</details>"
    )


def _masked(token_ids: tuple[int, ...], tokenizer: Any, name: str = "appended to the turn") -> str:
    """Tokens that the model read but did not sample, greyed out."""
    if not token_ids:
        return ""
    said = f"{name}: {tokens(len(token_ids))}, not trained on"
    text = decoded(tokenizer, token_ids)
    if text is None:
        return f'<div class="masked">{said}</div>'
    return f'<details class="masked"><summary>{said}</summary>{said_html(text)}</details>'


def _member_row(number: int, episode: Episode, advantage: float | None) -> str:
    answer = "" if episode.answer is None else line_html(episode.answer)
    found = verdict(episode)
    cells = [
        f'<th><span class="{found}">{MARKS[found]}</span> {number}</th>',
        f"<td>{f'{episode.reward:.3g}' if episode.is_complete else '–'}</td>",
        f"<td>{'–' if advantage is None else f'{advantage:+.3g}'}</td>",
        f"<td>{len(episode.turns)}</td><td>{len(episode.tokens):,}</td><td>{episode.seconds:.1f}</td>",
        f'<td class="text">{answer}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


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


def episode_text(episode: Episode) -> str:
    """The whole episode: question, turns, searches with passages, answer, reward."""
    question = episode.question
    golden = [f"golden answer: {_golden(episode)}"] if question.golden_answers else []
    lines = [f"question: {_line(question.question)}", *golden, ""]
    if episode.given is not None:
        problem = episode.given.problem
        found = _call_lines(episode.given) if problem is None else [f"  none: {_line(problem)}"]
        lines += ["given with the question:", *found, ""]
    for number, turn in enumerate(episode.turns, start=1):
        cut = ", cut at the token limit" if turn.truncated else ""
        lines += [f"turn {number} ({tokens(len(turn.sampled_tokens))}{cut}):", _shown(turn.text, MAX_TEXT)]
        lines += _call_lines(turn.call)
        lines.append("")
    answer = "no answer" if episode.answer is None else f"answer: {_line(episode.answer)}"
    lines += [
        marked(episode, answer),
        f"{_line(reward_words(episode))}; stopped ({episode.stop_reason.value}): {STOP_WORDS[episode.stop_reason]}",
    ]
    if episode.error:
        lines.append(f"error: {_line(episode.error)}")
    return "\n".join(lines)


def episode_line(episode: Episode) -> str:
    """A one-line summary, for lists and groups."""
    answer = "no answer" if episode.answer is None else repr(_line(episode.answer, 60))
    return (
        f"<Episode {_line(episode.question.data_source, 40)}/{_line(episode.question.id, 40)} "
        f"{MARKS[verdict(episode)]} {answer}, {_line(reward_words(episode), 120)}, {counted(len(episode.turns), 'turn')}>"
    )


def group_text(group: Group) -> str:
    """The question and one line per member, failed ones last."""
    lines = [
        f"group of {counted(len(group.episodes) + len(group.failed), 'episode')}: {_line(group.question.question)}"
    ]
    lines += [f"  {episode_line(episode)}" for episode in (*group.episodes, *group.failed)]
    return "\n".join(lines)


def _golden(episode: Episode) -> str:
    return " or ".join(_line(answer, 200) for answer in episode.question.golden_answers[:20])


def _call_lines(call: SearchCall | None) -> list[str]:
    if call is None:
        return []
    if call.problem is not None:
        return [f"  malformed call: {_line(call.problem)}"]
    lines: list[str] = []
    for place, query in enumerate(call.queries):
        found = call.results[place] if place < len(call.results) else None
        lines.append(f"  search: {_line(query)}" + ("" if found is not None else " (not run)"))
        lines += [
            f"    {_line(passage.title, 200)} ({passage.score:.3f}): {_line(passage.text, MAX_PASSAGE)}"
            for passage in found or ()
        ]
    return lines


def _line(text: str, limit: int = MAX_LINE) -> str:
    return " ".join(_shown(text, limit).split())


def _shown(text: str, limit: int) -> str:
    shown, left_out = clipped(text, limit)
    return visible_text(shown) + (f" … {left_out:,} more characters" if left_out else "")
