"""Episodes and groups as HTML for a notebook cell, with own styles and no script, and as terminal-safe plain text. Pure."""

from __future__ import annotations

from typing import Any

from searchr1_async.episodes.table import centred
from searchr1_async.episodes.types import Episode, Group, SearchCall
from searchr1_async.watch.viewer.markup import (
    MARKS,
    STOP_WORDS,
    cell_style,
    counted,
    learning_words,
    marked,
    reward_words,
    tokens,
    verdict,
    visible,
    visible_text,
)
from searchr1_async.watch.viewer.parts import (
    MAX_LINE,
    MAX_PASSAGE,
    MAX_TEXT,
    SHADED,
    clipped,
    decoded,
    given_html,
    golden_html,
    legend_html,
    line_html,
    said_html,
    tokenizer_of,
    turn_html,
    verdict_html,
)


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
