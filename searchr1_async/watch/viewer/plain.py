"""Episodes as terminal-safe plain text, without control or bidi characters. Pure."""

from __future__ import annotations

from searchr1_async.episodes.types import Episode, Group, SearchCall
from searchr1_async.watch.html import visible_text
from searchr1_async.watch.viewer.parts import MAX_LINE, MAX_PASSAGE, MAX_TEXT, clipped
from searchr1_async.watch.viewer.words import MARKS, STOP_WORDS, counted, marked, reward_words, tokens, verdict


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
