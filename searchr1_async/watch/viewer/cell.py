"""Episodes and groups as HTML for a notebook cell, with own styles and no script. Pure."""

from __future__ import annotations

from typing import Any

from searchr1_async.episodes.table import centred
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.watch.html import visible
from searchr1_async.watch.viewer.parts import (
    SHADED,
    given_html,
    golden_html,
    legend_html,
    line_html,
    said_html,
    turn_html,
    verdict_html,
)
from searchr1_async.watch.viewer.style import cell_style
from searchr1_async.watch.viewer.tokens import decoded, tokenizer_of
from searchr1_async.watch.viewer.words import MARKS, counted, learning_words, tokens, verdict


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
